"""The claim's experiment: its verdicts on the reference's own numbers, and a sweep that goes on."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import claim, claim_figures
from benchmarks.claim_figures import REFERENCE
from looped_jax.experiments.comparison import verdict

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


def test_one_loop_is_run_once_and_equal_flops_are_equal():
    setting = dataclasses.replace(TINY, loops=(1, 2, 12), seeds=(1, 2), equal_flops=True)
    runs = claim.list_runs(setting, 256)
    assert len(runs) == len(set(runs)) == 2 + 2 * 2 * 2 + 2
    assert sum(run.loops == 1 and run.steps == 20 for run in runs) == 2
    longer = claim.flops.count(setting.config(runs[-1], 256).model).flops * runs[-1].steps
    twelve = next(run for run in runs if run.loops == 12)
    assert longer == pytest.approx(
        20 * claim.flops.count(setting.config(twelve, 256).model).flops, rel=0.05
    )
    assert setting.config(runs[0], 256).optim.warmdown_ratio == 0


@pytest.fixture(scope="module")
def swept(tmp_path_factory, home):
    out = tmp_path_factory.mktemp("claim")
    setting = dataclasses.replace(TINY, data=str(home / "text"))
    return setting, out, claim.sweep(setting, out)


def test_a_sweep_trains_and_goes_on_after_a_kill(swept, monkeypatch):
    setting, out, lines = swept
    assert [(line["rule"], line["loops"]) for line in lines] == [("FLT", 1), ("FLT", 2), ("LT", 2)]
    for line in lines:
        assert len(line["loss"]) == len(line["grad_norm"]) == 20
        assert np.shape(line["norms"]) == (4, line["loops"])
        assert line["loss"][-1] < line["loss"][0]
    first = {line["loss"][0] for line in lines}
    assert len(first) == 1  # same weights, same tokens, and fresh loops change nothing

    path = out / "runs.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-50])  # killed while the last line was written
    trained = []
    real = claim.train
    monkeypatch.setattr(claim, "train", lambda *args: trained.append(args[1]) or real(*args))
    again = claim.sweep(setting, out)
    assert [(run.rule, run.loops) for run in trained] == [("LT", 2)]
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    assert claim.sweep(setting, out) == again and len(trained) == 1


def test_a_folder_of_another_setting_is_refused(swept):
    setting, out, _ = swept
    with pytest.raises(ValueError, match="another setting"):
        claim.sweep(dataclasses.replace(setting, width=32), out)


def test_the_program_draws_and_tabulates_what_was_run(swept, monkeypatch, capsys):
    setting, out, _ = swept
    monkeypatch.setitem(claim.PRESETS, "laptop", setting)
    claim.main(["--out", str(out)])
    printed = capsys.readouterr().out
    assert "3 runs, 3 of them are in" in printed
    table = (out / "table.md").read_text()
    assert table.count("\n") == 5 and "| LT K=2, 20 steps |" in table
    for name in ("curves", "summary"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (out / f"{name}.svg").read_bytes()
    assert json.loads((out / "setting.json").read_text())["steps"] == 20


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
