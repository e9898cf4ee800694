"""Comparison of runs: a page that stands alone, its files, and the sweep's plan."""

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from looped_jax import compare
from tests.experiments.comparison.recorded import record

ROOT = Path(__file__).parents[3]


def test_a_page_of_runs_says_how_they_differ_and_what_was_not_recorded(tmp_path, capsys):
    runs = [
        record(tmp_path / "calm & <b>", grad_norm_cv=0.05),
        record(tmp_path / "wild", variant="LT", loops=4, inside=False, lr=0.08, grad_norm_cv=0.9),
        record(tmp_path / "calm", grad_norm_cv=0.1, seed=1),
    ]
    out = tmp_path / "page"
    compare.main([*map(str, runs), "--out", str(out)])
    text = (out / "index.html").read_text()
    printed = capsys.readouterr().out
    assert f"open {out / 'index.html'}" in printed and "one seed: no spread" in printed
    assert not re.search(r"(src|href)='(?!data:)|https?:", text) and "<b>" not in text
    assert "optim.matrix_learning_rate is 0.02, 0.08" in text
    assert re.search("LT K=4 [^<]*: its gradient-norm CV is", text)
    written = json.loads((out / "comparison.json").read_text())
    wild = written["wild"]
    assert wild["loop_swings"] is None and wild["growth"] == pytest.approx(27)
    assert wild["gradient_swings"] == pytest.approx(0.9) and wild["spikes"] == 0
    rows = {row["label"]: row for row in written["groups"]}
    both = rows["FLT K=2 optim.matrix_learning_rate=0.02"]
    assert both["runs"] == ["calm & <b>", "calm"]
    assert both["metrics"]["bpb"]["values"] == pytest.approx([1.4, 1.4])
    drawn = {"loss", "gradient", "scores", "inside"}
    for ending in ("png", "svg", "pdf"):
        assert {path.stem for path in out.glob(f"*.{ending}")} == drawn
    assert {path.stem for path in out.glob("*.csv")} == drawn | {"table", "runs"}
    of_runs = list(csv.DictReader((out / "runs.csv").open()))
    assert [(line["run"], line["seed"]) for line in of_runs] == [
        ("calm & <b>", "0"), ("wild", "0"), ("calm", "1"),
    ]  # fmt: skip
    assert of_runs[1]["row"] == "LT K=4 optim.matrix_learning_rate=0.08"
    assert r"\begin{tabular}" in (out / "table.tex").read_text()


def test_a_run_that_stopped_is_shown_as_collapsed(tmp_path, capsys):
    """And no NaN is in a JSON file, which has no word for it."""
    record(tmp_path / "good", every=20)
    record(tmp_path / "broken", variant="LT", last=-30, every=20)
    record(tmp_path / "at_once", variant="LT_i", last=-1)
    out = tmp_path / "page"
    runs = [str(tmp_path / name) for name in ("good", "broken", "at_once")]
    compare.main([*runs, "--out", str(out), "--equal", "flops"])
    assert "collapsed (stopped at step 30: not finite)" in capsys.readouterr().out
    text = (out / "index.html").read_text()
    assert "<tr class='collapsed'><td>LT K=2</td>" in text and "equal flops" in text
    assert "collapsed (stopped at step 1: not finite)" in text
    written = json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert written["broken"]["loss"] is None and written["broken"]["steps"] == 30
    lines = list(csv.reader((out / "loss.csv").open()))
    assert ["loss, nats", "broken, stopped"] in [line[:2] for line in lines]
    assert (out / "validation.png").is_file()


def test_runs_that_cannot_be_compared_are_named(tmp_path, capsys):
    good = record(tmp_path / "good")
    empty = record(tmp_path / "empty")
    (empty / "metrics.jsonl").write_text("")
    (tmp_path / "other").mkdir()
    for folders, words in (
        ([good, tmp_path / "nothing"], "nothing is no run folder"),
        ([good, empty], "0 steps; train it first"),
        ([good, record(tmp_path / "other" / "good")], "two folders are named good"),
        ([good, record(tmp_path / "groups")], "named groups"),
        ([good, "--metric=bbp"], "metric 'bbp': no run has it; choose loss, bpb"),
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
