"""Every part, loop rule, embedding and objective beside the plain model, in three places.

    python -m benchmarks.parts                       # what is not trained yet, tables and figure
    python -m benchmarks.parts --only kv_shift       # of one row and the baseline, three seeds each
    python -m benchmarks.parts --times               # a step of each row beside the baseline's

The grids of parts_grids.py; what was stopped goes on. Writes tables, their numbers and a figure
into <out>. What was seen stands in benchmarks/parts.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import parts_report
from benchmarks.parts_grids import BASELINE, PLACES, equal_tokens, grid, rows
from looped_jax import errors, files
from looped_jax.errors import ConfigError, TrainingError
from looped_jax.experiments import throughput, workers
from looped_jax.experiments.experiment import Experiment, has_diverged, is_complete
from looped_jax.plotting import figure_files
from looped_jax.runtime.compilation_cache import keep_compiled

TURN, ROUNDS, SECONDS = 6, 9, 0.1  # rows that are timed in turns with the baseline, and how


def train(place: str, only: tuple[str, ...], folder: Path, count: int | None) -> dict[str, str]:
    """The rows of a place, trained as far as they are not yet; what stood in the way, by run."""
    places = workers.places(count)
    experiment = Experiment.open(grid(place, only), folder / place, places)
    print(f"{place}: ", end="")
    return experiment.train(places, lambda line: print(line, flush=True))


def time_steps(place: str, only: tuple[str, ...], out: Path) -> None:
    """Seconds of a step of each row over those of the baseline, into <out>/times.json."""
    runs = {run.row.label: run for run in equal_tokens(place, only).runs(Path())}
    first, rows_left = runs.pop(BASELINE), list(runs.values())
    path, known = out / "times.json", read_times(out)
    keep_compiled()
    for at in range(0, len(rows_left), TURN):
        turn = rows_left[at : at + TURN]
        jax.clear_caches()
        base, *seconds = throughput.seconds_per_step(
            [run.settings for run in (first, *turn)], rounds=ROUNDS, seconds=SECONDS
        )
        ratios = {r.row.label: round(s / base, 3) for r, s in zip(turn, seconds, strict=True)}
        known[place] = known.get(place, {}) | ratios
        files.write_json(path, known, indent=1)
        print(f"{place}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()), flush=True)


def read_times(out: Path) -> dict[str, dict[str, float]]:
    """By place and row; none where none were measured."""
    path = out / "times.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def report(folder: Path, out: Path) -> None:
    """Tables and figure of the rows whose runs have ended, here or where <out> was written.

    A place where the baseline's have not is left out.
    """
    tables = {}
    for place in PLACES:
        path = out / f"{place}.json"
        tables[place] = parts_report.read_numbers(path)
        if (folder / place).is_dir():
            experiment = Experiment.open(grid(place), folder / place, workers.places(1))
            ended = [run for run in experiment.runs if is_complete(run) or has_diverged(run)]
            tables[place] |= parts_report.numbers(place, ended)
            files.write_text(path, parts_report.as_text(tables[place]))
    if not any(BASELINE in of for of in tables.values()):
        return
    told = parts_report.markdown(tables, read_times(out))
    files.write_text(out / "tables.md", told)
    figure_files.save(parts_report.figure(tables), out / "parts")
    print(f"\n{told}\nopen {out / 'parts.png'}")


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--only", action="append", default=[], help="a row; all of them")
    flags.add_argument("--place", choices=PLACES, action="append", help="of the three; all of them")
    flags.add_argument("--times", action="store_true", help="measure steps; nothing is trained")
    flags.add_argument("--runs", type=Path, default=Path("runs/parts"), help="folder of the runs")
    flags.add_argument("--out", type=Path, default=Path("benchmarks/results/parts"))
    flags.add_argument("--workers", type=int, help="runs at a time; one per GPU or core")
    args = flags.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the workers have the devices
    only = tuple(args.only)
    with errors.printed():
        if unknown := [label for label in only if label not in rows()]:
            raise ConfigError(
                f"--only={unknown[0]}: no row is called so; choose {', '.join(rows())}"
            )
        failed: dict[str, str] = {}
        for place in args.place or PLACES:
            if args.times:
                time_steps(place, only, args.out)
            else:
                failed |= train(place, only, args.runs, args.workers)
        report(args.runs, args.out)
        if failed:
            raise TrainingError("; ".join(f"{run}: {told}" for run, told in failed.items()))


if __name__ == "__main__":
    main()
