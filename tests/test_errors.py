"""One line for what a user can put right, and where it came from when asked."""

import subprocess
import sys
from pathlib import Path

import pytest

from looped_jax import errors, generate

ROOT = Path(__file__).parents[1]


def test_a_program_ends_with_one_line():
    command = [sys.executable, "-m", "looped_jax.generate", "--checkpoint", "runs/nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: runs/nowhere is no run folder")
    assert len(done.stderr.splitlines()) == 1


def test_the_cause_is_shown_when_asked(monkeypatch):
    monkeypatch.setenv("LOOPED_JAX_TRACEBACK", "1")
    with pytest.raises(errors.CheckpointError) as raised:  # Python prints where it came from
        generate.main(["--checkpoint", "runs/nowhere"])
    assert isinstance(raised.value.__cause__, FileNotFoundError)


def test_only_what_a_user_can_put_right_is_shortened(monkeypatch, capsys):
    monkeypatch.delenv("LOOPED_JAX_TRACEBACK", raising=False)
    with pytest.raises(ZeroDivisionError), errors.printed():
        _ = 1 / 0
    with pytest.raises(SystemExit) as end, errors.printed(code=3):
        raise errors.DataError("data.path=x is no folder; give one")
    assert end.value.code == 3
    assert capsys.readouterr().err == "error: data.path=x is no folder; give one\n"
