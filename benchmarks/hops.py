"""Loops that pay, in a quarter of an hour on two cores: pointers followed further than in training.

    python -m benchmarks.hops              # make hops
    python -m benchmarks.hops --rates      # the sweep that chose the rates

Three grids of hops_grids.py, three seeds each, as many runs at a time as there are cores; what was
stopped goes on. Writes figures, their numbers and table.md into <out>. What was seen stands in
benchmarks/hops.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import hops_figures
from benchmarks.hops_grids import GRIDS, RATES, candidates, rated
from looped_jax import errors, files
from looped_jax.errors import TrainingError
from looped_jax.experiments import workers
from looped_jax.experiments.comparison.page import write_page
from looped_jax.experiments.comparison.run_record import read
from looped_jax.experiments.experiment import Experiment
from looped_jax.experiments.grid import Grid
from looped_jax.plotting import figure_files


def train(name: str, grid: dict, folder: Path, count: int | None) -> Experiment:
    """The grid, trained as far as it was not yet."""
    places = workers.places(count)
    experiment = Experiment.open(Grid.from_dict(grid, name=name), folder / name, places)
    print(f"{name}: ", end="")
    failed = experiment.train(places, lambda line: print(line, flush=True))
    if failed:
        raise TrainingError("; ".join(f"{run}: {told}" for run, told in failed.items()))
    return experiment


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.hops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--rates", action="store_true", help="try several rates for each row")
    flags.add_argument("--runs", type=Path, default=Path("runs/hops"), help="folder of the runs")
    flags.add_argument("--out", type=Path, default=Path("benchmarks/results/hops"))
    flags.add_argument("--workers", type=int, help="runs at a time; one per GPU or core")
    flags.add_argument("--only", choices=GRIDS, action="append", help="of the grids; all of them")
    args = flags.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the workers have the devices
    with errors.printed():
        found = {}
        for name in args.only or GRIDS:
            grid = candidates(name) if args.rates else rated(GRIDS[name](), RATES.get(name, {}))
            folder = args.runs / "rates" if args.rates else args.runs
            found[name] = train(name, grid, folder, args.workers)
    for name, experiment in found.items():
        out = experiment.out / "comparison"
        labels = {run.folder.name: run.row.label for run in experiment.runs}
        records = [read(run.folder) for run in experiment.runs]
        metric, loops = hops_figures.RANKED[name]
        _, table = write_page(records, out, labels=labels, loops=loops, metric=metric)
        print(f"\n{name}\n{table.text()}\nopen {out / 'index.html'}")
    if not args.rates and len(found) == len(GRIDS):
        draw(found, args.out)


def draw(found: dict[str, Experiment], out: Path) -> None:
    """The figures and the table of the page."""
    rows = {name: hops_figures.rows_of(experiment) for name, experiment in found.items()}
    settled = {
        label: hops_figures.settling(
            [run for run in found["chain_ends"].runs if run.row.label == label]
        )
        for label in ("FLT K=4", "LT K=4")
    }
    figure_files.save(hops_figures.overview(**rows), out / "hops")
    details = hops_figures.chain_details(rows["chain_ends"], settled)
    figure_files.save(details, out / "chain_ends")
    table = hops_figures.table(**rows)
    files.write_text(out / "table.md", table)
    print(f"\n{table}\nopen {out / 'hops.png'}\nopen {out / 'chain_ends.png'}")


if __name__ == "__main__":
    main()
