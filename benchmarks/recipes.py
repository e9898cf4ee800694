"""FLT's recipe and nanochat's, in one loop and in four, on two corpora.

    python -m benchmarks.recipes                            # on text that every machine has
    python -m benchmarks.recipes --fineweb data/fineweb_edu # and on FineWeb-edu, its shards or some
    python -m benchmarks.recipes --rates                    # the sweep that chose the rates

A recipe is model, optimizer and schedule, at the sizes of the preset `tiny`. Three seeds, equal
tokens and equal FLOPs; what was stopped goes on. Writes a table of each corpus into <out>. What was
seen stands in benchmarks/recipes.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.hops import train
from benchmarks.parts_grids import QUIET
from looped_jax import errors, files
from looped_jax.config import presets
from looped_jax.config.settings import Settings
from looped_jax.experiments.comparison.page import write_page
from looped_jax.experiments.comparison.run_record import read

LOOPS = 4
SEEDS = [0, 1, 2]
RECIPES = {"FLT": ("FLT", "tiny", "tiny"), "nanochat": ("nanochat", "laptop", "laptop_loops")}
REFERENCE = f"FLT, {LOOPS} loops"
MATRIX = "optim.matrix_learning_rate"
RATE = 0.04  # of matrices, by the sweep of `--rates`: of four the best or as good, for every row
SHORT = {**QUIET, "train.steps": 150, "train.eval_tokens": 16_384}


def recipe(name: str, loops: int) -> dict[str, Any]:
    """What a recipe has that the preset flt:tiny has not, by dotted name."""
    family, flat, looped = RECIPES[name]
    values = presets.make(family, flat if loops == 1 else looped)
    values.model.loops = loops
    values.train.eval_loops = (loops,)
    found, base = (
        Settings.from_dict(config).leaves() for config in (values, presets.make("FLT", "tiny"))
    )
    return {key: value for key, value in found.items() if value != base[key]}


def rows() -> dict[str, dict[str, Any]]:
    """Each recipe in one loop and in several, by label."""
    return {
        f"{name}, {'1 loop' if loops == 1 else f'{loops} loops'}": recipe(name, loops)
        for name in RECIPES
        for loops in (1, LOOPS)
    }


def grid(corpus: str) -> dict[str, Any]:
    """The rows, and those of one loop again with as many FLOPs as four loops cost."""
    listed = []
    for label, settings in rows().items():
        rated = settings | {MATRIX: RATE}
        listed.append({"label": label, "settings": rated})
        if label.endswith("1 loop"):
            listed.append({"label": f"{label}, equal FLOPs", "settings": rated, "equal": "flops"})
    return _grid(listed, corpus, SEEDS)


def candidates() -> dict[str, Any]:
    """Each row at four rates of its matrices, on seeds of their own."""
    listed = [
        {"label": f"{label}, rate {rate:g}", "settings": settings | {MATRIX: rate}}
        for label, settings in rows().items()
        for rate in (0.01, 0.02, 0.04, 0.08)
    ]
    return _grid(listed, "builtin", [10, 11])


def _grid(listed: list[dict[str, Any]], corpus: str, seeds: list[int]) -> dict[str, Any]:
    labels = [row["label"] for row in listed]
    return {
        "config": "flt:tiny",
        "settings": {**SHORT, "data.path": corpus},
        "rows": listed,
        "seeds": seeds,
        "reference": REFERENCE if REFERENCE in labels else labels[0],
    }


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--rates", action="store_true", help="try several rates for each row")
    flags.add_argument("--fineweb", type=Path, help="folder of FineWeb-edu shards; it comes second")
    flags.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="folder of the runs")
    flags.add_argument("--out", type=Path, default=Path("benchmarks/results/recipes"))
    flags.add_argument("--workers", type=int, help="runs at a time; one per GPU or core")
    args = flags.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the workers have the devices
    grids = {"rates": candidates()} if args.rates else {"builtin": grid("builtin")}
    if args.fineweb and not args.rates:
        grids["fineweb_edu"] = grid(str(args.fineweb.resolve()))
    with errors.printed():
        for name, values in grids.items():
            experiment = train(name, values, args.runs, args.workers)
            records = [read(run.folder) for run in experiment.runs]
            labels = {run.folder.name: run.row.label for run in experiment.runs}
            page = experiment.out / "comparison"
            _, table = write_page(records, page, labels=labels)
            files.write_text(args.out / f"{name}.md", table.text())
            print(f"\n{name}\n{table.text()}\nopen {page / 'index.html'}")


if __name__ == "__main__":
    main()
