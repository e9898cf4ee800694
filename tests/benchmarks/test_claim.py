"""The claim's experiment: its verdicts on the reference's own numbers, and a sweep that goes on."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks import claim, claim_figures
from benchmarks.claim_figures import REFERENCE
from looped_jax.config.registry import TASKS
from looped_jax.errors import ConfigError
from looped_jax.experiments.comparison import verdict
from looped_jax.experiments.grid import Grid

TINY = dataclasses.replace(
    claim.PRESETS["laptop"], layers=1, width=16, heads=1, seq_len=16, batch_size=2, steps=20,
    characters=2_000, loops=(1, 2), rules=("FLT", "LT"), seeds=(1,), rates=(), equal_flops=False,
)  # fmt: skip


def like(row):
    """A run with the losses, gradient-norm peak and CV of one row of the reference's table."""
    middle, end, peak, cv = row[:4]
    losses = np.concatenate([np.full(100, middle), np.full(100, end)])
    norms = np.ones(200)
    norms[verdict.BURN_IN :: 2], norms[verdict.BURN_IN + 1 :: 2] = 1 + cv, 1 - cv  # mean 1, std cv
    norms[0] = peak
    return {"loss": losses, "grad_norm": norms, "mean_norms": [9, 5000], "held_out": 2.0}


@pytest.mark.parametrize(
    ("run", "outcomes"),
    [
        (("FLT", 1, 1.0), ["trains"]),
        (("LT", 3, 1.0), ["unstable"]),  # its gradient norm varies, and it still learns
        (("LT", 6, 1.0), ["collapsed"]),
        (("LT", 9, 1.0), ["collapsed"]),
        (("LT", 12, 1.0), ["collapsed"] * 3),
        (("FLT", 12, 1.0), ["trains"] * 3),
        (("FLT_res", 12, 1.0), ["unstable", "trains"]),
        (("LT_i", 12, 1.0), ["trains"]),
        (("LT_ia", 12, 1.0), ["trains"]),
        (("FLT", 12, 4.0), ["trains"]),  # with a norm of thousands
    ],
)
def test_verdicts_on_what_the_reference_did(run, outcomes):
    single = like(REFERENCE["FLT", 1, 1.0][0])
    assert [claim.judge(like(row), single).outcome for row in REFERENCE[run]] == outcomes


def test_numbers_behind_a_verdict():
    found = claim.judge(like((3.0, 2.5, 7.0, 0.3)), like((3.0, 2.0, 1.0, 0.1)))
    assert (found.loss_at_half, found.loss_at_end, found.grad_norm_peak) == (3.0, 2.5, 7.0)
    assert found.grad_norm_cv == pytest.approx(0.3)
    assert found.outcome == "unstable"  # seven times the single loop's peak
    broken = like((3.0, float("nan"), float("nan"), 0.3))
    assert claim.judge(broken, like((3.0, 2.0, 1.0, 0.1))).outcome == "collapsed"


def test_one_loop_is_run_once_and_equal_flops_are_equal(home):
    setting = dataclasses.replace(
        TINY, loops=(1, 2, 12), seeds=(1, 2), equal_flops=True, data=str(home / "text")
    )
    grid = Grid.from_dict(setting.grid())
    runs = grid.runs(Path("nowhere"), grid.equal_flops(Path("nowhere")))
    assert len(runs) == 2 + 2 * 2 * 2 + 2
    one = [run for run in runs if run.config.model.loops == 1]
    assert [run.config.train.steps for run in one[:2]] == [20, 20] and len(one) == 4
    twelve = next(run for run in runs if run.row.label == "FLT K=12")
    assert one[-1].flops == pytest.approx(twelve.flops, rel=0.05)
    assert runs[0].config.optim.warmdown_ratio == 0


@pytest.fixture(scope="module")
def swept(tmp_path_factory, home):
    """A setting, the folder of its runs, and their lines."""
    out = tmp_path_factory.mktemp("claim")
    setting = dataclasses.replace(TINY, data=str(home / "text"))
    flags = os.environ.get("XLA_FLAGS", "").split()
    with pytest.MonkeyPatch.context() as patch:  # a worker, unlike these tests, sees one device
        patch.setenv("XLA_FLAGS", " ".join(f for f in flags if "device_count" not in f))
        return setting, out, claim.sweep(setting, out, count=1)


def test_a_sweep_trains_every_rule_on_the_same_tokens(swept):
    setting, out, lines = swept
    assert [(line["rule"], line["loops"]) for line in lines] == [("FLT", 1), ("FLT", 2), ("LT", 2)]
    for line in lines:
        assert len(line["loss"]) == len(line["grad_norm"]) == 20
        assert np.shape(line["norms"]) == (4, line["loops"])
        assert line["loss"][-1] < line["loss"][0]
        assert line["rate"] == 1 and 0 < line["held_out"] < 6
    first = {line["loss"][0] for line in lines}
    assert len(first) == 1  # same weights, same tokens, and fresh loops change nothing
    assert claim.sweep(setting, out) == lines  # all of them are there


def test_crops_go_on_where_they_were(home):
    setting = dataclasses.replace(TINY, data=str(home / "text"))
    run = Grid.from_dict(setting.grid()).runs(Path("nowhere"))[0]
    rows = TASKS["claim"](run.settings).train_rows(run.config, batch_size=2)
    before = [next(rows) for _ in range(3)]
    rows.set_state({"batch": 1})
    np.testing.assert_array_equal(next(rows), before[1])
    assert rows.get_state() == {"batch": 2}
    assert before[0].shape == (2, setting.seq_len + 1)


def test_a_folder_of_another_setting_is_refused(swept):
    setting, out, _ = swept
    with pytest.raises(ConfigError, match="holds a run with"):
        claim.sweep(dataclasses.replace(setting, width=32), out)


def test_the_program_draws_and_tabulates_what_was_run(swept, monkeypatch, capsys):
    setting, runs, lines = swept
    out = runs / "out"
    monkeypatch.setitem(claim.PRESETS, "laptop", setting)
    claim.main(["--out", str(out), "--runs", str(runs)])
    printed = capsys.readouterr().out
    assert "3 runs, 3 of them done" in printed
    assert claim.read(out / "runs.jsonl") == lines
    table = (out / "table.md").read_text()
    assert table.count("\n") == 5 and "| LT K=2, 20 steps |" in table
    for name in ("curves", "summary"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (out / f"{name}.svg").read_bytes()


def test_crosses_are_pytorch_on_the_same_tokens(swept):
    setting, _, lines = swept
    ours = claim.judge_all(lines, setting)
    theirs = claim.judge_all([{**line, "loss": [9.0] * 20} for line in lines], setting)
    for torch, losses in ((theirs, {9.0}), ([], set())):
        axis = claim_figures._summary(ours, torch).axes[0]
        crosses = [line for line in axis.lines if line.get_marker() == "x"]
        assert {y for line in crosses for y in line.get_ydata()} == losses
        assert ("PyTorch, same tokens" in axis.get_legend().get_title().get_text()) == bool(torch)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--rules", "LTT"], "LTT"), (["--loops", "0,3"], "--loops"), (["--seeds", "x"], "--seeds")],
)
def test_nonsense_is_named(arguments, named, capsys):
    with pytest.raises(SystemExit):
        claim.main(arguments)
    assert named in capsys.readouterr().err
