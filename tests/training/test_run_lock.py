"""A folder in which one run trains at a time."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from looped_jax import files
from looped_jax.errors import CheckpointError
from looped_jax.training import run_lock
from looped_jax.training.run_lock import RunLock
from tests.programs import ROOT, run_here

HOLDS = """
import sys, time
from looped_jax.training import run_lock
from looped_jax.training.run_lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_start_is_refused_by_who_is_at_it_until_that_one_is_killed(home, tmp_path):
    run = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDS, run], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "held\n"
        code, out, err = run_here(home, run, steps=1)
    finally:
        first.kill()
        first.wait()
    assert code == 1 and "compiled" not in out
    assert err.startswith(f"error: train.run_dir={run} is in use: process {first.pid} on ")
    assert socket.gethostname() in err and "since 20" in err and err.count("\n") == 1
    assert [path.name for path in run.iterdir()] == [".lock"]  # nothing of the other was touched
    code, out, err = run_here(home, run, steps=1)
    assert code == 0, err


def test_the_lock_is_let_go_at_the_end_and_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), RunLock(tmp_path):
            with pytest.raises(CheckpointError, match=f"process {os.getpid()} on"):
                RunLock(tmp_path).__enter__()
            raise KeyError


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def lock(file, *, wait):
        raise OSError(errno.ENOLCK, "none")

    monkeypatch.setattr(files, "lock", lock)
    with RunLock(tmp_path) as held:
        assert "No locks available" in held.warning and "second start" in held.warning


def test_a_lock_that_cannot_be_opened_is_said_in_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(CheckpointError, match=r"\.lock cannot be opened \(Is a directory\)"):
        RunLock(tmp_path).__enter__()


def test_what_another_host_wrote_may_be_seen_late(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "VISIBLE_AFTER", 0.0)
    holder = {"host": "another", "pid": 1, "since": "2026-11-29 10:00:00 UTC"}
    written = threading.Timer(0.3, (tmp_path / ".lock").write_text, [json.dumps(holder)])
    written.start()
    RunLock(tmp_path)._expect(holder)
    written.join()
    with pytest.raises(CheckpointError, match="is not the folder that process 0 has"):
        RunLock(tmp_path)._expect(holder | {"host": socket.gethostname()})


def test_who_waits_for_a_folder_has_it_once_it_is_free(tmp_path):
    with RunLock(tmp_path):
        began = time.monotonic()
        run_lock.wait_until_free(tmp_path, seconds=0.3)
        assert time.monotonic() - began >= 0.3
    began = time.monotonic()
    run_lock.wait_until_free(tmp_path, seconds=60)
    assert time.monotonic() - began < 30
