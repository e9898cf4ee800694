"""Comparison of runs: known statistics, a page that stands alone, and the sweep's plan."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from looped_jax import compare
from looped_jax.config.settings import ModelSettings, OptimConfig, Settings
from looped_jax.diagnostics import run_comparison
from looped_jax.resolve import resolve

ROOT = Path(__file__).parents[2]
STEPS = 60


def record(folder, *, loops=2, variant="FLT", inside=True, spike=(), lr=0.02, grad_norm_cv=0.0):
    """A run folder with a log whose statistics are known."""
    folder.mkdir()
    settings = Settings(
        model=ModelSettings(variant=variant, loops=loops, layers=2),
        optim=OptimConfig(matrix_learning_rate=lr),
    )
    config = resolve(settings, vocab_size=97)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    lines = []
    for step in range(1, STEPS + 1):
        loss = 5 - step / STEPS + 0.01 * (-1) ** step + (1.0 if step in spike else 0.0)
        norms = [4.0 * 3**k for k in range(loops)]
        lines.append({"step": step, "train/loss": loss, "loop/residual_norm": norms,
                      "train/grad_norm": 1 + grad_norm_cv * (-1) ** step})  # fmt: skip
        if inside and step % 10 == 0:
            sign = (-1) ** (step // 10)
            blocks = [[3.0 + 1.5 * sign, 4.0 + 2.0 * sign] for _ in range(loops)]
            lines.append({"step": step, "diagnostics/gradient_block": blocks})
    lines.append({"step": STEPS, "val/bpb_loops_1": 2.5, f"val/bpb_loops_{loops}": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_statistics_of_a_known_record(tmp_path):
    found = run_comparison.summarize(
        run_comparison.read(record(tmp_path / "run", grad_norm_cv=0.3))
    )
    assert found.steps == STEPS
    assert found.loss == pytest.approx(np.mean([5 - s / STEPS for s in range(51, 61)]))
    assert found.residual_growth == pytest.approx(3)
    assert found.grad_norm_cv == pytest.approx(0.3)
    assert found.loop_grad_norm_cv == pytest.approx(0.5)  # norms 2.5 and 7.5 by turns
    assert found.spikes == 0
    assert found.scores == {1: 2.5, 2: 2.0}


def test_spikes_are_counted_where_they_stand_out(tmp_path):
    run = run_comparison.read(record(tmp_path / "run", spike=(5, 30, 50)))
    assert np.flatnonzero(run_comparison.spikes(run.loss)).tolist() == [29, 49]
    assert run_comparison.summarize(run).spikes == 2  # the first has too little before it
    assert not run_comparison.spikes(np.linspace(5, 2, 100)).any()


def test_a_page_of_runs_says_how_they_differ_and_what_was_not_recorded(tmp_path, capsys):
    runs = [
        record(tmp_path / "calm & <b>", grad_norm_cv=0.05),
        record(tmp_path / "wild", variant="LT", loops=4, inside=False, lr=0.08, grad_norm_cv=0.9),
        record(tmp_path / "calm", grad_norm_cv=0.1),
    ]
    out = tmp_path / "page"
    compare.main([*map(str, runs), "--out", str(out)])
    text = (out / "index.html").read_text()
    assert f"open {out / 'index.html'}" in capsys.readouterr().out
    assert not re.search(r"(src|href)='(?!data:)|https?:", text) and "<b>" not in text
    assert "optim.matrix_learning_rate is 0.02, 0.08" in text
    assert "not recorded" in text and "wild: its gradient-norm CV is" in text
    written = json.loads((out / "comparison.json").read_text())
    wild = written["wild"]
    assert wild["loop_swings"] is None and wild["growth"] == pytest.approx(27)
    assert wild["gradient_swings"] == pytest.approx(0.9) and wild["spikes"] == 0
    pictures = {path.stem for path in out.glob("*.png")}
    assert pictures == {"loss", "gradient", "scores", "inside"}


def test_runs_that_cannot_be_compared_are_named(tmp_path, capsys):
    good = record(tmp_path / "good")
    empty = record(tmp_path / "empty")
    (empty / "metrics.jsonl").write_text("")
    (tmp_path / "other").mkdir()
    for folders, words in (
        ([good, tmp_path / "nothing"], "nothing is no run folder"),
        ([good, empty], "0 steps; train it first"),
        ([good, record(tmp_path / "other" / "good")], "two folders are named good"),
    ):
        with pytest.raises(SystemExit):
            compare.main([*map(str, folders), "--out", str(tmp_path / "page")])
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_the_sweep_runs_every_rule_at_every_count_but_one_loop_once():
    environment = {**os.environ, "RULES": "flt lt", "LOOPS": "1 3", "STEPS": "5", "OUT": "runs/x"}
    done = subprocess.run(
        [ROOT / "launch" / "check.sh", "--dry-run", "--config.train.seed=1"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    *trained, compared = done.stdout.splitlines()
    assert trained == [
        f"python -m looped_jax.train --config configs/{rule}.py:tiny --config.model.loops={k} "
        f"--config.train.steps=5 --config.train.diagnostics_every=10 "
        f"--config.train.run_dir=runs/x/{rule}_K{k} --config.train.seed=1"
        for rule, k in (("flt", 1), ("flt", 3), ("lt", 3))
    ]
    assert compared == (
        "python -m looped_jax.compare runs/x/flt_K1 runs/x/flt_K3 runs/x/lt_K3 "
        "--out runs/x/comparison"
    )
