"""Steps on a GPU: what ran is kept and not run again, what failed is told and tried again."""

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
SAID = {"good": (0, "| a table |"), "bad": (1, "what went wrong"), "long": (None, "half of it")}


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


def test_a_step_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--dry", "gold", "silver"])
    with pytest.raises(SystemExit):
        on_gpu.main()
    assert "no step is called 'silver'; known: goldens, " in capsys.readouterr().err
