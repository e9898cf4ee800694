"""The grids of both recipes: what their rows differ in, and that a page comes of them (slow)."""

import os
from pathlib import Path

import pytest

from benchmarks import recipes
from looped_jax.config import presets
from looped_jax.config.settings import Settings
from looped_jax.experiments.grid import Grid

PAGE = Path(recipes.__file__).parent


def test_a_row_is_its_recipe_at_one_size_and_length():
    grid = Grid.from_dict(recipes.grid("builtin"))
    runs = {run.row.label: run for run in grid.runs(Path("runs"))}
    assert len(runs) == 6 and len(grid.seeds) == 3
    looped = runs["nanochat, 4 loops"].settings
    preset = Settings.from_dict(presets.make("nanochat", "laptop_loops"))
    assert looped.model == preset.model and looped.optim.groups == preset.optim.groups
    assert looped.optim.optimizers == preset.optim.optimizers
    for run in runs.values():
        model, train = run.settings.model, run.settings.train
        assert (model.layers, model.width) == (2, 128)
        assert (train.tokens_per_step, train.steps) == (4096, 150)
        assert run.settings.data.packing == "stream"
    steps = grid.equal_flops(Path("runs"))
    assert set(steps) == {"FLT, 1 loop, equal FLOPs", "nanochat, 1 loop, equal FLOPs"}
    assert all(300 < count < 400 for count in steps.values())


def test_the_sweep_tries_the_rate_of_the_page_and_others_on_other_seeds():
    tried, page = (Grid.from_dict(g) for g in (recipes.candidates(), recipes.grid("builtin")))
    rates = {row.settings[recipes.MATRIX] for row in tried.rows}
    assert min(rates) < recipes.RATE < max(rates)
    assert len(tried.rows) == 4 * len(rates) and set(tried.seeds).isdisjoint(page.seeds)


@pytest.mark.parametrize("name", ["builtin", "fineweb_edu", "rates"])
def test_the_page_has_the_numbers_of_its_runs(name):
    page = (PAGE / "recipes.md").read_text("utf-8")
    told = (PAGE / "results" / "recipes" / f"{name}.md").read_text("utf-8")
    rows = [line.split("  ") for line in told.splitlines()[1:]]
    assert len(rows) >= 6
    for cells in rows:
        label, _, _, _, bpb, *_ = [cell.strip() for cell in cells if cell.strip()]
        lines = [line for line in page.splitlines() if line.startswith(f"| {label} |")]
        assert any(bpb in line for line in lines), label


@pytest.mark.slow
def test_a_page_is_written(tmp_path, monkeypatch, capsys):
    flags = os.environ.get("XLA_FLAGS", "").split()  # workers see one device, unlike these tests
    monkeypatch.setenv("XLA_FLAGS", " ".join(f for f in flags if "device_count" not in f))
    short = {"train.steps": 2, "model.width": 32, "model.layers": 1, "train.eval_tokens": 256}
    monkeypatch.setattr(recipes, "SHORT", recipes.SHORT | short)
    monkeypatch.setattr(recipes, "LOOPS", 2)
    monkeypatch.setattr(recipes, "REFERENCE", "FLT, 2 loops")
    monkeypatch.setattr(recipes, "SEEDS", [0])
    monkeypatch.setattr(recipes, "RECIPES", {"FLT": recipes.RECIPES["FLT"]})
    recipes.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert "3 runs, 0 of them done" in capsys.readouterr().out
    assert "FLT, 2 loops" in (tmp_path / "out" / "builtin.md").read_text("utf-8")
