"""Steps on a GPU: what ran is kept and not run again, what failed is told and tried again."""

import argparse
import importlib
import os
import shlex
import subprocess
import sys

import pytest

from benchmarks import on_gpu
from benchmarks.on_gpu import Step


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(on_gpu, "versions", lambda: "versions")
    monkeypatch.setattr(
        on_gpu, "run", lambda command, environment: RAN.append(command[-1]) or SAID[command[-1]]
    )
    RAN.clear()


RAN: list[str] = []
SAID = {
    "skipped": (0, "3 skipped"),
    "passed": (0, "2 passed, 1 skipped"),
    "good": (0, "| a table |"),
    "bad": (1, "what went wrong"),
    "long": (None, "half of it"),
}


def test_a_result_is_kept_and_not_measured_twice(tmp_path):
    step = Step("one", "module", "good", "good")
    assert on_gpu.take(step, tmp_path, dry=False) and on_gpu.take(step, tmp_path, dry=False)
    assert RAN == ["good"]
    kept = (tmp_path / "one.md").read_text()
    assert kept.startswith("`python -m module good`, ") and kept.endswith("| a table |")
    assert "versions" in kept


@pytest.mark.parametrize("what", ["bad", "long"])
def test_a_failure_is_told_and_tried_again(tmp_path, capsys, what):
    step = Step("two", "module", what, what)
    assert not on_gpu.take(step, tmp_path, dry=False)
    assert SAID[what][1] in (tmp_path / "two.failed").read_text()
    assert "two: FAILED after" in capsys.readouterr().err
    assert not on_gpu.take(step, tmp_path, dry=False)
    assert len(RAN) == 2
    repaired = Step("two", "module", "good", "good")
    assert on_gpu.take(repaired, tmp_path, dry=False)
    assert [path.name for path in tmp_path.iterdir()] == ["two.md"]


def test_what_happens_may_be_the_result_but_not_that_nothing_did(tmp_path):
    assert on_gpu.take(Step("a", "module", "bad", "bad", may_fail=True), tmp_path, dry=False)
    assert not on_gpu.take(Step("b", "module", "long", "long", may_fail=True), tmp_path, dry=False)


def test_tests_that_were_all_left_out_are_no_result(tmp_path):
    assert not on_gpu.take(Step("c", "pytest", "skipped", "skipped"), tmp_path, dry=False)
    assert on_gpu.take(Step("d", "pytest", "passed", "passed"), tmp_path, dry=False)


def test_what_was_started_ends_with_the_one_that_waits(monkeypatch):
    class Stopped(subprocess.Popen):
        def communicate(self, *args, **kwargs):
            started.append(self.pid)
            raise KeyboardInterrupt

    started: list[int] = []
    monkeypatch.setattr(on_gpu.subprocess, "Popen", Stopped)
    with pytest.raises(KeyboardInterrupt):
        REAL_RUN([sys.executable, "-c", "import time; time.sleep(600)"], dict(os.environ))
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(
            step, id=step.name, marks=pytest.mark.parity if step.module == "benchmarks.race" else ()
        )
        for step in on_gpu.STEPS
        if step.module.startswith("benchmarks.")
    ],
)
def test_real_arguments_are_known_to_what_they_are_given_to(step, monkeypatch, capsys):
    """The first thing after parsing is to ask for devices, or to build something: neither comes."""
    words = [word.format(out="results") for word in shlex.split(step.real)]
    monkeypatch.setattr(sys, "argv", [step.module, *words])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        importlib.import_module(step.module).main()


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [s for s in on_gpu.STEPS if s.module == "pytest"], ids=lambda s: s.name
)
def test_what_is_tried_dry_exists(step):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *shlex.split(step.toy)]
    assert subprocess.run(command, cwd=on_gpu.ROOT, capture_output=True).returncode == 0


class Parsed(Exception):
    pass


REAL_PARSE, REAL_RUN = argparse.ArgumentParser.parse_args, on_gpu.run


def parse_and_stop(self, *args, **kwargs):
    REAL_PARSE(self, *args, **kwargs)
    raise Parsed


def test_a_step_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--dry", "gold", "silver"])
    with pytest.raises(SystemExit):
        on_gpu.main()
    assert "no step is called 'silver'; known: goldens, " in capsys.readouterr().err
