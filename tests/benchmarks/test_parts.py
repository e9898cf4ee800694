"""The grid over the parts: its rows, what it calls noise, and its page."""

import dataclasses
import math
import os
from pathlib import Path

import pytest

from benchmarks import parts, parts_grids, parts_report
from benchmarks.parts_grids import BASELINE, EQUAL_FLOPS, LEFT_OUT, NOT_MEASURED, PLACES, SEEDS
from benchmarks.parts_report import Numbers
from looped_jax.config.registry import EMBEDDINGS, LOOP_RULES, OBJECTIVES, PARTS
from looped_jax.config.settings import ModelSettings

PAGE = Path(parts.__file__).parent
RESULTS = PAGE / "results/parts"


def numbers(*values, flops=1.0):
    return Numbers(values, values, steps=10, step_flops=flops, parameters=1)


@pytest.mark.parametrize("registry", [PARTS, LOOP_RULES, EMBEDDINGS, OBJECTIVES])
def test_all_that_is_registered_has_a_row(registry):
    plain = ModelSettings()
    named = set().union(*map(parts_grids.names, parts_grids.rows().values()))
    named |= {plain.variant, plain.embedding, plain.loss}
    ours = {name for name in registry if registry[name].__module__.startswith("looped_jax.")}
    missing = ours - named - {*LEFT_OUT, *NOT_MEASURED}
    assert not missing, "give it a row in benchmarks/parts_grids.py, or name it in NOT_MEASURED"
    assert named.isdisjoint(LEFT_OUT) and named.isdisjoint(NOT_MEASURED)


@pytest.mark.parametrize("place", PLACES)
def test_every_row_can_be_trained_everywhere(place, tmp_path):
    grid = parts_grids.equal_tokens(place)
    runs = grid.runs(tmp_path)
    assert len(runs) == len(SEEDS) * (1 + len(parts_grids.rows())) and grid.reference == BASELINE
    at = PLACES[place]
    counts = set(at.settings["train.eval_loops"]) | {4}
    assert {at.loops or 4, at.also[1] or 4} <= counts
    assert {run.settings.model.loops for run in runs} == {1, 4}


def test_a_row_of_other_flops_is_there_again_as_long_as_it_may_cost(tmp_path):
    grid = parts_grids.grid("hops", ("kv_shift", "one loop", "STEP"))
    assert [row.label for row in grid.rows] == [
        BASELINE, "one loop", "kv_shift", "STEP", f"one loop{EQUAL_FLOPS}", f"STEP{EQUAL_FLOPS}",
    ]  # fmt: skip
    runs = {r.row.label: r for r in grid.runs(tmp_path, grid.equal_flops(tmp_path))}
    for label in ("one loop", "STEP"):
        assert runs[label + EQUAL_FLOPS].flops == pytest.approx(runs[BASELINE].flops, rel=0.01)


def test_holm_stops_at_the_first_that_does_not_hold():
    assert parts_report.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == {
        "a": True, "b": False, "c": False, "d": True,
    }  # fmt: skip
    assert parts_report.holm({"a": 0.012, "b": 0.011}) == {"a": True, "b": True}


def test_only_what_stands_out_among_all_rows_is_called_better_or_worse():
    found = {
        BASELINE: numbers(2.50, 2.51, 2.52),
        "far better": numbers(2.00, 2.01, 2.02),
        "far worse": numbers(3.00, 3.01, 3.02),
        "same": numbers(2.50, 2.51, 2.52),
        "broken": numbers(2.50, 2.51, math.nan),
    }
    alone = {BASELINE: found[BASELINE], "close": numbers(2.46, 2.475, 2.485)}
    close = parts_report.judge("text", alone)["close"]
    assert close.word == "better" and 0.01 < close.p < 0.05
    among = parts_report.judge("text", found | alone)
    assert {label: of.word for label, of in among.items()} == {
        "far better": "better", "far worse": "worse", "same": "within noise",
        "broken": "diverged", "close": "unclear",
    }  # fmt: skip
    assert among["same"].p == 1 and among["close"].p == close.p
    assert parts_report.judge("hops", found)["far worse"].word == "better"  # an accuracy


def test_a_table_tells_noise_costs_and_what_diverged():
    found = {
        BASELINE: numbers(2.5, 2.51, 2.52),
        "kv_shift": numbers(2.5, 2.51, 2.53),
        "STEP": numbers(2.0, 2.01, math.nan, flops=1.4),
        f"STEP{EQUAL_FLOPS}": numbers(2.6, 2.61, 2.62, flops=1.4),
    }
    told = parts_report.markdown({"text": found}, {"text": {"STEP": 1.37}})
    kv_shift, step = (
        next(line for line in told.splitlines() if line.startswith(f"| {label} |"))
        for label in ("kv_shift", "STEP")
    )
    assert "within noise" in kv_shift and "the same" in kv_shift and "better" not in told
    assert "(1 of 3 diverged)" in step and "| 1.40 | 1.37 | 2.610 ± 0.010 | +0.100, **wor" in step
    assert all(name in told for name in (*LEFT_OUT, *NOT_MEASURED))


def test_numbers_are_read_as_they_were_written(tmp_path):
    found = {BASELINE: numbers(2.5, 2.51), "LT": numbers(2.75, 3.0)}
    (tmp_path / "text.json").write_text(parts_report.as_text(found))
    assert parts_report.as_text(parts_report.read_numbers(tmp_path / "text.json")) == (
        parts_report.as_text(found)
    )
    assert parts_report.read_numbers(tmp_path / "hops.json") == {}


def test_the_page_has_every_row_and_its_numbers():
    found = {place: parts_report.read_numbers(RESULTS / f"{place}.json") for place in PLACES}
    for place, of in found.items():
        assert {BASELINE, *parts_grids.rows()} <= set(of), place
    page = (PAGE / "parts.md").read_text()
    told = parts_report.markdown(found, parts.read_times(RESULTS))
    assert told == (RESULTS / "tables.md").read_text()
    for line in told.splitlines():
        assert line in page
    assert len(parts_report.figure(found).axes) == len(PLACES)


@pytest.mark.slow
def test_a_row_is_trained_and_told(tmp_path, monkeypatch, capsys):
    flags = os.environ.get("XLA_FLAGS", "").split()  # workers see one device, unlike these tests
    monkeypatch.setenv("XLA_FLAGS", " ".join(f for f in flags if "device_count" not in f))
    short = {"model.width": 32, "train.steps": 2, "train.eval_tokens": 64}
    short["train.batch_size"] = (
        4  # which the eight devices of this process fill a step with as well
    )
    place = PLACES["hops"]
    place = dataclasses.replace(place, settings={**place.settings, **short})
    monkeypatch.setitem(PLACES, "hops", place)
    command = ["--place", "hops", "--only", "STEP", "--out", str(tmp_path / "out")]
    command += ["--runs", str(tmp_path / "runs"), "--workers", "1"]
    parts.main(command)
    parts.main([*command, "--times"])
    told = capsys.readouterr().out
    assert "9 runs, 0 of them done" in told and "| STEP |" in told
    assert set(parts.read_times(tmp_path / "out")["hops"]) == {"STEP"}
    assert set(parts_report.read_numbers(tmp_path / "out/hops.json")) == {
        BASELINE, "STEP", f"STEP{EQUAL_FLOPS}",
    }  # fmt: skip


def test_a_row_that_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parts.main(["--only", "kvshift", "--runs", str(tmp_path)])
    assert "--only=kvshift: no row is called so" in capsys.readouterr().err
