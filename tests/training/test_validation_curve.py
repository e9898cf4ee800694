"""How validation went: every step and loop count of the log, also where they differ."""

import sys

import pytest
from matplotlib.colors import to_hex

from looped_jax.plotting import figures
from looped_jax.training.metric_log import MetricLog
from looped_jax.training.validation_curve import NAME, ValidationCurve


@pytest.fixture
def run(tmp_path):
    log = MetricLog(tmp_path, start=0)
    log.write(0, {"val/bpb_loops_1": 3.5, "val/bpb_loops_4": 3.5, "val/ppl_loops_1": 90.0})
    for step in (5, 10):
        log.write(step, {"train/loss": 2.0})
        log.write(step, {"val/bpb_loops_1": 2.0 + 1 / step, "val/bpb_loops_4": 1.5 + 1 / step})
    log.write(15, {"val/bpb_loops_4": 1.25})  # resumed with other train.eval_loops
    log.close()
    return tmp_path


def test_the_table_has_a_line_per_validation_and_a_column_per_loop_count(run):
    curve = ValidationCurve.read(run, metric="bpb", trained=4)
    assert str(curve).splitlines() == [
        "validation, bpb",
        "      step    1 loop   4 loops",
        "         0    3.5000    3.5000",
        "         5    2.2000    1.7000",
        "        10    2.1000    1.6000",
        "        15              1.2500",
    ]
    assert ValidationCurve.read(run, metric="ppl", trained=1).scores == {0: {1: 90.0}}


@pytest.mark.parametrize(("count", "steps"), [(1, [0]), (2, [0, 1]), (100, [*range(0, 100, 11)])])
def test_of_many_validations_a_few_are_told_the_first_and_last_among_them(count, steps):
    curve = ValidationCurve("bpb", 1, {step: {1: 1.0} for step in range(count)})
    assert [int(line.split()[0]) for line in str(curve).splitlines()[2:]] == steps


def test_the_figure_has_a_line_per_loop_count_and_marks_the_trained_one(run):
    ValidationCurve.read(run, metric="bpb", trained=4).draw(run)
    assert (run / f"{NAME}.png").read_bytes().startswith(b"\x89PNG")
    assert {path.suffix for path in run.glob(f"{NAME}.*")} == {".png", ".svg", ".pdf", ".csv"}
    lines = {1: {0: 3.5, 5: 2.2}, 4: {0: 3.5, 5: 1.7, 15: 1.25}}
    figure = figures.validation_by_loops(lines, metric="bpb", trained=4)
    one, four = figure.axes[0].lines
    assert [*zip(one.get_xdata(), one.get_ydata(), strict=True)] == [*lines[1].items()]
    assert [*zip(four.get_xdata(), four.get_ydata(), strict=True)] == [*lines[4].items()]
    assert (four.get_color(), four.get_label()) == (figures.RED, "4 loops, as trained")
    assert to_hex(one.get_color()) != figures.RED


def test_without_matplotlib_nothing_is_drawn_and_nothing_left_half(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "looped_jax.plotting.figures")
    monkeypatch.delattr("looped_jax.plotting.figures")
    with pytest.raises(ImportError, match="matplotlib"):
        ValidationCurve.read(run, metric="bpb", trained=4).draw(run)
    assert not list(run.glob(f"{NAME}.*"))
