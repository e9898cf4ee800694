"""Train a grid of settings and seeds, several runs at a time, and compare them.

    looped-jax sweep benchmarks/grids/rules.yaml --out runs/rules

What is done is kept: the same command goes on after it was stopped, and draws the page again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax

from looped_jax import cli, errors
from looped_jax.errors import TrainingError
from looped_jax.experiments import workers
from looped_jax.experiments.comparison.page import write_page
from looped_jax.experiments.comparison.run_record import read
from looped_jax.experiments.experiment import LOG, Experiment, is_complete
from looped_jax.experiments.grid import Grid
from looped_jax.files import check_writable


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("sweep", argv))


def run(args: argparse.Namespace) -> None:
    jax.config.update("jax_platforms", "cpu")  # the workers have the devices
    with errors.printed():
        out = args.out or Path("runs") / args.grid.stem
        check_writable(out, "--out")
        places = workers.places(args.workers)
        experiment = Experiment.open(Grid.read(args.grid), out, places)
        if args.dry_run:
            print(listed(experiment))
            return
        failed = experiment.train(places, lambda line: print(line, flush=True))
        begun = [run for run in experiment.runs if (run.folder / LOG).is_file()]
        if begun:
            page, table = write_page(
                [read(run.folder) for run in begun],
                out / "comparison",
                labels={run.folder.name: run.row.label for run in begun},
                loops=args.loops,
                equal=args.equal,
                metric=args.metric,
                reference=args.reference,
            )
            print(f"{table.text()}\nopen {page}")
        if failed:
            name, told = next(iter(failed.items()))
            raise TrainingError(f"{len(failed)} runs failed, the first of them {name}: {told}")


def listed(experiment: Experiment) -> str:
    """Every row with its length and cost, and how many of its runs are done."""
    lines = []
    for row in experiment.grid.rows:
        runs = [run for run in experiment.runs if run.row == row]
        config, done = runs[0].config, sum(map(is_complete, runs))
        lines.append(
            f"{row.label}: {config.train.steps} steps, "
            f"{config.train.steps * config.train.tokens_per_step:,} tokens, "
            f"{runs[0].flops:.3g} FLOPs a run{_timed(experiment, row.label)}; "
            f"{done} of {len(runs)} runs done"
        )
    return "\n".join(lines)


def _timed(experiment: Experiment, label: str) -> str:
    """Where rows shall take equal seconds, what a step of this one takes."""
    seconds = experiment.seconds.get(label)
    return "" if seconds is None else f", {1e3 * seconds:.1f} ms a step"


if __name__ == "__main__":
    main()
