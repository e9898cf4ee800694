"""The record of a run: every scalar of a step in both files, and a log that survives kills."""

import json
import math
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from looped_jax.errors import DataError
from looped_jax.training.metric_log import MetricLog, read_log

SCALARS = {
    "train/loss": 2.5,
    "loop/norm": [1.0, 2.0],
    "diagnostics/g": [[1.0], [4.0]],
    "w": {"a": 8.0},
}


def events(folder):
    """Events of a TensorBoard file: length, checksum, message, checksum."""
    (path,) = folder.glob("events.*")
    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += 16 + length
    return found


def test_both_files_hold_every_scalar_of_a_step(tmp_path):
    log = MetricLog(tmp_path, start=0)
    log.write(1, SCALARS)
    log.write(2, {"train/loss": 2.0})
    log.close()
    assert read_log(tmp_path) == [{"step": 1, **SCALARS}, {"step": 2, "train/loss": 2.0}]
    steps = {event.step: event for event in events(tmp_path / "tensorboard") if event.summary.value}
    tags = {value.tag: value.simple_value for value in steps[1].summary.value}
    assert tags == {"train/loss": 2.5, "loop/norm/0": 1.0, "loop/norm/1": 2.0,
                    "diagnostics/g/0/0": 1.0, "diagnostics/g/1/0": 4.0, "w/a": 8.0}  # fmt: skip
    assert [value.simple_value for value in steps[2].summary.value] == [2.0]


def test_steps_that_are_taken_again_replace_the_old_ones(tmp_path):
    log = MetricLog(tmp_path, start=0)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # a kill
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3]
    log = MetricLog(tmp_path, start=2)
    log.write(3, {"train/loss": 30.0})
    log.close()
    assert [entry["train/loss"] for entry in read_log(tmp_path)] == [1.0, 2.0, 30.0]


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    log = MetricLog(tmp_path, start=0)
    log.write(1, {"a": math.nan, "b": [1.0, math.inf], "c": 2.0})
    log.close()
    written = (tmp_path / "metrics.jsonl").read_text()
    assert written == '{"step": 1, "a": null, "b": [1.0, null], "c": 2.0}\n'
    (entry,) = read_log(tmp_path)
    assert math.isnan(entry["a"]) and math.isnan(entry["b"][1]) and entry["c"] == 2.0


def test_step_0_is_kept_by_a_resume_and_dropped_by_a_new_start(tmp_path):
    for _ in range(2):  # a run that was killed before its first checkpoint starts anew
        log = MetricLog(tmp_path, start=0)
        log.write(0, {"val/bpb_loops_1": 3.0})
        log.write(1, {"train/loss": 1.0})
        log.close()
    MetricLog(tmp_path, start=1).close()
    assert [entry["step"] for entry in read_log(tmp_path)] == [0, 1]


def test_texts_are_in_tensorboard_and_in_a_file_that_a_resume_cuts(tmp_path):
    log, file = MetricLog(tmp_path, start=0), tmp_path / "metrics" / "samples.txt"
    log.write_text(2, "samples", "one\nstep 9\n")  # a line that looks like a step
    log.write_text(4, "samples", "two")
    log.close()
    whole = "step 2\n  one\n  step 9\nstep 4\n  two\n"
    assert file.read_text() == whole
    texts = [
        value.tensor.string_val[0].decode()
        for event in events(tmp_path / "tensorboard")
        for value in event.summary.value
    ]
    assert texts == ["    one\n    step 9\n", "    two"]
    (notes := tmp_path / "metrics" / "notes.txt").write_text("my own\n")
    MetricLog(tmp_path, start=4).close()
    assert file.read_text() == whole
    MetricLog(tmp_path, start=3).close()
    assert file.read_text() == "step 2\n  one\n  step 9\n"
    MetricLog(tmp_path, start=0).close()
    assert not file.exists() and notes.read_text() == "my own\n"


def test_damage_is_named_and_absence_is_no_entries(tmp_path):
    assert read_log(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(f"broken\n{json.dumps({'step': 1})}\n")
    with pytest.raises(DataError, match="metrics.jsonl is damaged"):
        read_log(tmp_path)
