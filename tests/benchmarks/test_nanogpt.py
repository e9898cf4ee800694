"""nanoGPT's model for a CPU: the page has the numbers of its runs, and the grid their rows."""

import json
import math
import re
import statistics
from pathlib import Path

from looped_jax.experiments.grid import Grid
from tests.programs import ROOT

PAGE = ROOT / "docs" / "from_nanogpt.md"
RUNS = ROOT / "benchmarks" / "results" / "nanogpt" / "runs.json"


def nats(row, step):
    """Per character after a step, one of each seed: bits per byte times ln 2."""
    runs = json.loads(RUNS.read_text("utf-8"))
    return [run["bpb"][step] * math.log(2) for run in runs if run["row"] == row]


def test_the_page_has_the_means_and_spreads_of_three_seeds():
    page = PAGE.read_text("utf-8")
    steps = re.search(r"^\| step \| (.*) \|$", page, re.M)[1].split(" | ")
    means = [f"{statistics.mean(nats('4 layers', step)):.3f}" for step in steps]
    assert f"three seeds | {' | '.join(means)} |" in page
    labels = re.findall(r"^\| ([^|]+) \| [\d,]+ \| ([\d.]+ ± [\d.]+) \|", page, re.M)
    assert len(labels) >= 2
    for label, told in labels:
        found = nats(label, steps[-1])
        assert len(found) == 3
        assert told == f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f}", label


def test_the_rows_of_the_grid_are_what_the_page_says():
    runs = Grid.read(ROOT / "benchmarks" / "grids" / "nanogpt.yaml").runs(Path("runs"))
    models = {run.row.label: run.settings.model for run in runs}
    visits = {label: model.layers * model.loops for label, model in models.items()}
    assert len(runs) == 3 * len(visits)
    assert visits.pop("FLT, 4 layers × 2 loops") == 8 and set(visits.values()) == {4}
