"""What is read off a run folder, and the statistics of it."""

import math

import numpy as np
import pytest

from looped_jax.errors import ArgumentError, DataError
from looped_jax.experiments.comparison import metrics, outcomes
from looped_jax.experiments.comparison.run_record import read
from looped_jax.model import flops
from tests.experiments.comparison.recorded import STEPS, evaluate, record


def named(found):
    return {metric.title: value for metric, value in found.items()}


def test_statistics_of_a_known_record(tmp_path):
    run = read(record(tmp_path / "run", grad_norm_cv=0.3))
    found = named(metrics.measure(run, loops=(1,)) | metrics.stability(run))
    assert found["loss"] == pytest.approx(np.mean([5 - s / STEPS for s in range(51, 61)]))
    assert found["residual growth"] == pytest.approx(3)
    assert found["gradient-norm CV"] == pytest.approx(0.3)
    assert found["CV per loop"] == pytest.approx(0.5)  # norms 2.5 and 7.5 by turns
    assert found["spikes"] == 0
    assert (found["bpb"], found["bpb at 1"]) == pytest.approx((1.4, 1.9))
    assert (found["steps"], found["tokens"], found["seconds"]) == (STEPS, STEPS * 1024, STEPS / 2)
    assert found["FLOPs"] == STEPS * 1024 * flops.count(run.config.model).flops
    assert found["tokens/s"] == 2048 and run.complete and run.stopped is None


def test_spikes_are_counted_where_they_stand_out(tmp_path):
    run = read(record(tmp_path / "run", spike=(5, 30, 50)))
    assert np.flatnonzero(metrics.spikes(run.loss)).tolist() == [29, 49]
    assert named(metrics.stability(run))["spikes"] == 2  # the first has too little before it
    assert not metrics.spikes(np.linspace(5, 2, 100)).any()


def test_scores_are_those_of_the_last_validation_and_evaluation_up_to_a_step(tmp_path):
    folder = record(tmp_path / "run", every=20)
    evaluate(folder, 40, [1, 2], {"CORE": [0.1, 0.2], "core boolq": [0.3, None]})
    evaluate(folder, 60, [2], {"CORE": [0.25]})
    run = read(folder)
    for step, bpb, core in ((60, 1.4, 0.25), (59, 1.6, 0.2), (39, 1.8, None)):
        found = named(metrics.measure(run, step))
        assert found["bpb"] == pytest.approx(bpb) and found.get("evaluated CORE") == core
        assert found["validation step"] == step // 20 * 20
    assert "bpb" not in named(metrics.measure(run, 19))
    details = {m.title for m in metrics.measure(run, 40, loops=(1,)) if m.kind == "detail"}
    assert {"evaluated core boolq at 1", "evaluation step"} <= details


def test_directions():
    higher = ("accuracy", "accuracy_distance_3", "core/mean", "evaluated CORE",
              "evaluated core boolq", "tokens/s")  # fmt: skip
    lower = ("loss", "bpb", "ppl", "error", "evaluated bpb validation", "evaluated ppl LAMBADA")
    for names, expected in ((higher, True), (lower, False)):
        for name in names:
            assert metrics.Metric(name, "score").higher_is_better is expected, name


def test_a_run_that_stopped_has_no_loss_and_keeps_its_cost(tmp_path):
    run = read(record(tmp_path / "run", last=-30, every=10))
    assert run.stopped == 30 and not run.complete
    found = named(metrics.measure(run) | metrics.stability(run))
    assert math.isnan(found["loss"]) and math.isnan(found["bpb"])
    assert found["steps"] == 30 and math.isfinite(found["gradient-norm CV"])
    assert named(metrics.measure(run, 20))["bpb"] == pytest.approx(1.8)  # before it broke
    assert str(outcomes.of([run])["run"]) == "collapsed (stopped at step 30: not finite)"


def test_a_run_that_is_not_done_says_so(tmp_path):
    run = read(record(tmp_path / "run", last=40))
    assert str(outcomes.of([run])["run"]) == "trains (40 of 60 steps)"


def test_an_old_log_without_seconds_has_all_else(tmp_path):
    folder = record(tmp_path / "run")
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text().replace("total/seconds", "x").replace("speed/", "y/"))
    found = named(metrics.measure(read(folder)))
    assert "tokens/s" not in found and math.isnan(found["seconds"]) and found["tokens"] > 0


def test_what_cannot_be_read_is_named(tmp_path):
    folder = record(tmp_path / "run")
    (folder / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary.json is damaged .*move it away"):
        read(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(ArgumentError, match="choose tokens, flops or seconds"):
        read(folder).spent("hours")
