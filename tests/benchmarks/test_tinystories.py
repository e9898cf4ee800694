"""The grid of fewer weights at equal FLOPs, and that the page has the numbers of its runs."""

from pathlib import Path

from looped_jax.experiments.grid import Grid
from looped_jax.model import flops
from looped_jax.resolve import resolve

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_its_rows_cost_the_same_with_fewer_weights():
    grid = Grid.read(BENCHMARKS / "grids" / "tinystories.yaml")
    assert len(grid.seeds) == 3
    found = {}
    for run in grid.runs(Path("runs")):
        model = resolve(run.settings, vocab_size=1_024).model
        costs, shape = flops.count(model), (model.layers, model.loops, model.variant)
        found[shape] = (costs.flops, run.settings.train.steps, costs.looped)
    assert {*found} == {(4, 1, "LT"), *((n, 4 // n, r) for n in (1, 2) for r in ("LT", "FLT"))}
    assert len({cost[:2] for cost in found.values()}) == 1
    weights = [found[shape][2] for shape in ((4, 1, "LT"), (2, 2, "FLT"), (1, 4, "LT"))]
    assert weights[0] == 2 * weights[1] == 4 * weights[2]


def test_the_page_has_the_numbers_of_its_runs():
    page = (BENCHMARKS.parent / "docs" / "from_tinystories.md").read_text("utf-8")
    told = (BENCHMARKS / "results" / "tinystories" / "builtin.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()]
            for line in told.splitlines()[1:]]  # fmt: skip
    assert len(rows) >= 2
    for label, *cells in rows:
        line = next(line for line in page.splitlines() if line.startswith(f"| {label} |"))
        assert all(cell in line for cell in cells if "±" in cell), label
