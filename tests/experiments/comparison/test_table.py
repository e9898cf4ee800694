"""Rows of seeds, their labels, budgets and ranking, and the table in every markup."""

import csv
import io

import numpy as np
import pytest

from looped_jax.errors import ArgumentError, DataError
from looped_jax.experiments.comparison.groups import group
from looped_jax.experiments.comparison.run_record import read
from looped_jax.experiments.comparison.table import tabulate
from tests.experiments.comparison.recorded import evaluate, record


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two rules with three seeds, and one run alone that stopped."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for seed in (0, 1, 2):
        for rule, base in (("FLT", 2.0), ("LT", 3.0)):
            scores = {"bpb": {1: 4.0, 2: base + 0.1 * seed}, "accuracy": {2: base / 10},
                      "accuracy_distance_3": {2: 0.5}}  # fmt: skip
            path = folder / f"{rule}_{seed}"
            record(path, variant=rule, seed=seed, scores=scores, every=20)
            made.append(path)
    record(folder / "broken", variant="LT", lr=0.5, last=-7)
    evaluate(folder / "FLT_0", 60, [2], {"CORE": [0.2]})
    return [read(path) for path in (*made, folder / "broken")]


def test_seeds_are_one_row_and_labels_tell_what_differs(runs):
    rows = group(runs)
    assert [(row.label, [run.name for run in row.runs]) for row in rows] == [
        ("FLT K=2 optim.matrix_learning_rate=0.02", ["FLT_0", "FLT_1", "FLT_2"]),
        ("LT K=2 optim.matrix_learning_rate=0.02", ["LT_0", "LT_1", "LT_2"]),
        ("LT K=2 optim.matrix_learning_rate=0.5", ["broken"]),
    ]
    assert [row.label for row in group(runs[:6])] == ["FLT K=2", "LT K=2"]
    assert group(runs, {"LT_1": "plain"})[1].label == "plain"
    with pytest.raises(ArgumentError, match="same: the label of two rows"):
        group(runs, {"LT_1": "same", "FLT_0": "same"})


def test_settings_that_change_nothing_are_told_only_where_rows_would_have_one_name(tmp_path):
    short, long = (read(record(tmp_path / str(n), steps=n)) for n in (50, 60))
    assert [r.label for r in group([short, long])] == ["FLT K=2 train.steps=50",
                                                      "FLT K=2 train.steps=60"]  # fmt: skip
    for name, every in (("a", 5), ("b", 7)):
        path = record(tmp_path / name)
        config = (path / "config.json").read_text().replace('"log_every": 10',
                                                            f'"log_every": {every}')  # fmt: skip
        (path / "config.json").write_text(config)
    both = [read(tmp_path / name) for name in "ab"]
    assert [r.label for r in group(both)] == ["FLT K=2 train.log_every=5",
                                              "FLT K=2 train.log_every=7"]  # fmt: skip
    assert [r.label for r in group([*both, short])][
        2
    ] == "FLT K=2 train.steps=50 train.log_every=10"


def cell(table, label, title):
    metric = next(m for m in table.metrics("score", "cost", "detail") if m.title == title)
    return next(row for row in table.rows if row.label == label).cells[metric]


def test_cells_are_mean_and_sample_deviation_over_seeds(runs):
    table = tabulate(group(runs[:6]), loops=(1,))
    found = cell(table, "FLT K=2", "bpb")
    values = [1.4, 1.5, 1.6]
    assert found.values == pytest.approx(values)
    assert (found.mean, found.deviation) == pytest.approx((1.5, np.std(values, ddof=1)))
    assert cell(table, "LT K=2", "bpb at 1").mean == pytest.approx(3.4)
    head, first, _ = table.cells("score")
    assert head[:3] == ["mean ± sample sd", "seeds", "outcome"]
    shown = dict(zip(head, first, strict=True))
    assert shown["bpb"] == "1.5000 ± 0.1000" and shown["evaluated CORE"] == "0.2000 (1 of 3)"
    assert "accuracy_distance_3" not in head  # a part of accuracy


@pytest.mark.parametrize(
    ("metric", "standings"),
    [
        (None, ["best", "worse (+1.0000, standard error 0.0816)"]),
        ("accuracy", ["worse (-0.1000, standard error 0.0000)", "best"]),
        ("accuracy_distance_3", ["best", "within noise (0.0000, standard error 0.0000)"]),
    ],
)
def test_rows_are_ranked_in_the_direction_of_the_metric(runs, metric, standings):
    table = tabulate(group(runs[:6])).rank(metric)
    assert [row.standing for row in table.rows] == standings
    assert (metric or "bpb") in table.cells("score")[0]


def test_a_row_of_reference_is_what_the_others_are_held_against(runs):
    table = tabulate(group(runs[:6])).rank(reference="LT K=2")
    assert [row.standing.split(" (")[0] for row in table.rows] == ["better", "reference"]
    assert table.cells("score")[0][-1] == "bpb against LT K=2"


def test_one_seed_is_not_ranked_and_what_stopped_is_not_either(runs):
    table = tabulate(group([runs[0], runs[6]])).rank("loss")
    assert [row.standing for row in table.rows] == [
        "one seed: no spread, no ranking", "not finite, not ranked",
    ]  # fmt: skip
    assert table.rows[1].collapsed and "not finite" in table.cells("score")[2]
    assert "±" not in table.text()


def test_what_is_not_there_is_named(runs):
    table = tabulate(group(runs[:6]))
    with pytest.raises(ArgumentError, match="metric 'bbp': no run has it; choose loss, bpb"):
        table.rank("bbp")
    with pytest.raises(ArgumentError, match="reference 'FLT': .* choose FLT K=2, LT K=2"):
        table.rank(reference="FLT")


def test_runs_are_read_off_at_an_equal_budget(tmp_path):
    one = record(tmp_path / "one", loops=1, every=20, seconds=0.5)
    four = record(tmp_path / "four", loops=4, every=20, seconds=0.6)
    record(tmp_path / "stopped", loops=4, lr=0.5, last=-3)  # holds nobody back
    runs = [read(path) for path in (one, four, tmp_path / "stopped")]
    labels = {run.name: run.name for run in runs}

    def steps(equal):
        table = tabulate(group(runs, labels), equal=equal)
        return [cell(table, name, "steps").mean for name in ("one", "four", "stopped")]

    assert steps(None) == steps("tokens") == [60, 60, 3]
    assert steps("seconds") == [60, 40, 3]  # 50 steps take as long; validated after 40
    costs = [run.spent("flops")[-1] for run in runs]
    assert costs[1] > 1.5 * costs[0]
    assert steps("flops") == [60, 60 * costs[0] // costs[1], 3]  # before its first validation
    table = tabulate(group(runs, labels), equal="seconds")
    assert cell(table, "four", "bpb").mean == pytest.approx(2.0 - 0.4)


def test_a_budget_that_cannot_be_had_is_named(tmp_path):
    runs = [read(record(tmp_path / "a", last=1)), read(record(tmp_path / "b", seconds=9.0))]
    with pytest.raises(DataError, match="b: its first step takes more than the 0.5 seconds"):
        tabulate(group(runs[:1]) + group(runs[1:]), equal="seconds")
    log = tmp_path / "b" / "metrics.jsonl"
    log.write_text(log.read_text().replace("total/seconds", "x"))
    with pytest.raises(DataError, match=r"b: its metrics.jsonl has no seconds"):
        tabulate(group([read(tmp_path / "b")]), equal="seconds")


def test_markups(runs):
    table = tabulate(group(runs, {"FLT_0": "50% & <b>|_{x}"})).rank()
    lines = list(csv.DictReader(io.StringIO(table.csv())))
    assert lines[0]["run"] == "50% & <b>|_{x}" and lines[0]["seeds"] == "3"
    assert float(lines[0]["bpb"]) == pytest.approx(1.5)
    assert float(lines[0]["bpb sd"]) == pytest.approx(0.1)
    assert lines[2]["loss"] == "nan" and lines[2]["bpb"] == lines[2]["loss sd"] == ""
    latex = table.latex()
    assert r"50\% \& <b>|\_\{x\} & 3 & trains & 4.0" in latex and r"1.5000 $\pm$ 0.1000" in latex
    assert latex.count(r"\\") == 4 and r"\bottomrule" in latex and "–" not in latex
    assert "<td>50% &amp; &lt;b&gt;|_{x}</td>" in table.html()
    assert table.html().count("class='collapsed'") == 1
    assert "1.5000\u00a0±\u00a00.1000" in table.html()  # on one line
    assert table.markdown().splitlines()[2].startswith(r"| 50% & <b>\|_{x} | 3 |")
    assert len({line.index("trains") for line in table.text().splitlines()[1:3]}) == 1
