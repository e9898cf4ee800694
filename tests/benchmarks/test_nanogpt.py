"""nanoGPT's model for a CPU: the page has the numbers of its runs, and the grid their rows."""

import csv
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

from looped_jax.experiments.grid import Grid, slug
from tests.programs import ROOT

PAGE = ROOT / "docs" / "from_nanogpt.md"
RUNS = ROOT / "benchmarks" / "results" / "nanogpt" / "validation.csv"


def curves():
    """Nats per character by row's slug and step, one of each seed; bits times ln 2."""
    found = defaultdict(list)
    with RUNS.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            row, _, seed = line["series"].rpartition("_seed")
            if line["panel"] == "bpb" and seed.isdecimal():
                found[row, int(line["x"])].append(float(line["y"]) * math.log(2))
    return found


def test_the_page_has_the_means_and_spreads_of_three_seeds():
    page, found = PAGE.read_text("utf-8"), curves()
    steps = [int(n) for n in re.search(r"^\| step \|(.*)\|$", page, re.M)[1].split("|")]
    means = [f"{statistics.mean(found['4_layers', step]):.3f}" for step in steps]
    assert f"three seeds | {' | '.join(means)} |" in page
    labels = re.findall(r"^\| ([^|]+) \| [\d,]+ \| ([\d.]+ ± [\d.]+) \|", page, re.M)
    assert len(labels) >= 2
    for label, told in labels:
        nats = found[slug(label), steps[-1]]
        assert len(nats) == 3
        assert told == f"{statistics.mean(nats):.4f} ± {statistics.stdev(nats):.4f}", label


def test_the_rows_of_the_grid_are_what_the_page_says():
    runs = Grid.read(ROOT / "benchmarks" / "grids" / "nanogpt.yaml").runs(Path("runs"))
    visits = {run.row.label: run.settings.model.layers * run.settings.model.loops for run in runs}
    assert len(runs) == 3 * len(visits)
    assert visits.pop("FLT, 4 layers × 2 loops") == 8 and set(visits.values()) == {4}
