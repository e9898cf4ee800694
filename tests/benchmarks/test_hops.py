"""The front page: its grids, its figures on untrained models, and what it claims (slow)."""

import copy
import os

import pytest

from benchmarks import hops, hops_figures
from benchmarks.hops_grids import GRIDS, RATES, candidates, rated
from looped_jax.experiments import workers
from looped_jax.experiments.comparison.run_record import read
from looped_jax.experiments.experiment import Experiment
from looped_jax.experiments.grid import Grid
from looped_jax.experiments.workers import Place


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Workers, unlike these tests, see one device each."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    monkeypatch.setenv("XLA_FLAGS", " ".join(f for f in flags if "device_count" not in f))
    monkeypatch.setattr(workers, "places", lambda count: [Place(), Place()])


@pytest.mark.parametrize("name", GRIDS)
def test_every_row_has_rates_that_the_sweep_tried(name, tmp_path):
    tried = Grid.from_dict(candidates(name)).rows
    page = Grid.from_dict(rated(GRIDS[name](), RATES[name]))
    assert set(candidates(name)["seeds"]).isdisjoint(page.seeds) and len(page.seeds) == 3
    for row in page.rows:
        rates = {key: row.settings[key] for key in row.settings if key.startswith("optim.")}
        same = [one for one in tried if rates.items() <= one.settings.items()]
        assert rates and same, row.label
    assert len(page.runs(tmp_path)) == 3 * len(page.rows)


@pytest.mark.slow
def test_the_page_is_drawn(tmp_path, monkeypatch, capsys):
    short = {name: grid(steps=1) for name, grid in copy.copy(GRIDS).items()}
    for grid in short.values():
        grid["settings"] |= {"train.eval_tokens": 64, "model.width": 8}
        grid["seeds"] = [0, 1]
    monkeypatch.setattr(hops, "GRIDS", {n: lambda g=g: copy.deepcopy(g) for n, g in short.items()})
    hops.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    for name in ("hops", "chain_ends"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / f"{name}.csv").read_text().count("\n") > 20
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in told and table.count("| FLT K=4 |") == 3
    assert "| flat, 4 layers |" in table and "| one loop, equal FLOPs |" in table


def trained(name, labels, folder, seed=0):
    """Runs of the page's grid with one of its seeds, by label."""
    grid = rated(GRIDS[name](), RATES[name])
    grid |= {"rows": [row for row in grid["rows"] if row["label"] in labels], "seeds": [seed]}
    experiment = Experiment.open(Grid.from_dict(grid), folder, workers.places(2))
    assert experiment.train(workers.places(2), print) == {}
    return {run.row.label: read(run.folder) for run in experiment.runs}


@pytest.mark.slow
def test_flt_walks_to_the_end_of_longer_chains_and_stays_where_the_plain_loop_decays(tmp_path):
    runs = trained("chain_ends", ("FLT K=4", "LT K=4"), tmp_path)
    after = hops_figures.after
    assert after(runs["FLT K=4"], 8) >= 0.97 and after(runs["FLT K=4"], 32) >= 0.97
    assert after(runs["FLT K=4"], 4) < 0.7  # it could not have found the ends without walking
    assert after(runs["LT K=4"], 32) <= 0.6


@pytest.mark.slow
def test_a_target_per_loop_is_right_far_beyond_the_trained_ones(tmp_path):
    runs = trained("steps", ("FLT K=4",), tmp_path)
    assert hops_figures.lowest(runs["FLT K=4"], range(5, 64)) >= 0.95


@pytest.mark.slow
def test_one_answer_takes_loops(tmp_path):
    runs = trained("hops", ("FLT K=4", "one loop"), tmp_path, seed=2)
    assert hops_figures.at_trained(runs["FLT K=4"], "accuracy") > 0.95
    assert hops_figures.at_trained(runs["one loop"], "accuracy") < 0.6
