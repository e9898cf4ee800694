"""An experiment: the runs of a grid in one folder, trained as far as they are not yet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looped_jax import files
from looped_jax.errors import CheckpointError, ConfigError
from looped_jax.experiments import workers
from looped_jax.experiments.grid import Grid, Run
from looped_jax.experiments.workers import Place, Worker
from looped_jax.resolve import matters
from looped_jax.training import summary
from looped_jax.training.progress import duration
from looped_jax.training.run_folder import read_config

LOG, THROUGHPUT = "metrics.jsonl", "throughput.json"
EVERY = 15.0  # seconds between lines that tell how far the runs are


@dataclass
class Experiment:
    """A grid, its folder, and its runs.

    seconds: of a step of each row, by label, where the grid asks for equal seconds
    """

    grid: Grid
    out: Path
    runs: list[Run]
    seconds: dict[str, float]

    @staticmethod
    def open(grid: Grid, out: Path, places: Sequence[Place]) -> Experiment:
        """Find out how long each run is, and what is done. Raises ConfigError or DataError.

        Throughput is measured where a row shall take as many seconds as another, once: it is kept.
        """
        grid.runs(out)  # what is wrong is said before anything is measured
        steps, seconds = grid.equal_flops(out), {}
        if timed := [row.label for row in grid.rows if row.equal == "seconds"]:
            seconds = _throughput(grid, out, places)
            reference = _first(grid, out)[grid.reference]
            budget = reference.config.train.steps * seconds[grid.reference]
            steps |= {label: max(1, round(budget / seconds[label])) for label in timed}
        found = Experiment(grid, out, grid.runs(out, steps), seconds)
        for run in found.runs:
            _check_same(run)
        return found

    def missing(self) -> list[Run]:
        """Runs that are neither complete nor diverged, the most work first."""
        found = [run for run in self.runs if not is_complete(run) and not has_diverged(run)]
        return sorted(found, key=lambda run: -run.flops)

    def train(self, places: Sequence[Place], log: Callable[[str], None]) -> dict[str, str]:
        """Train what is missing; what stood in the way of those that failed, by name."""
        missing, failed = self.missing(), {}
        log(
            f"{len(self.runs)} runs, {len(self.runs) - len(missing)} of them done; "
            f"{min(len(places), len(missing))} at a time, in {self.out}"
        )
        progress = _Progress(missing, log)
        for run, outcome in workers.train_all(
            missing, places, imports=self.grid.imports, watch=progress.tell
        ):
            if outcome.failed:
                failed[run.name] = outcome.message
            ended = "complete" if is_complete(run) else "stopped; the same command goes on"
            progress.done(run, outcome.message or ended)
        return failed


def is_complete(run: Run) -> bool:
    """Whether the run's folder has the summary of its last step."""
    return _read(run.folder / summary.NAME).get("steps") == run.config.train.steps


def has_diverged(run: Run) -> bool:
    """Whether training ended at values that are not finite; moved away, it starts anew."""
    last = _last_entry(run)
    return "train/loss" in last and None in (last["train/loss"], last["train/grad_norm"])


# ---- what the experiment uses --------------------------------------------------------------------


def _throughput(grid: Grid, out: Path, places: Sequence[Place]) -> dict[str, float]:
    """Seconds of a step of each row, by label; those in the folder if they are of these rows."""
    first = _first(grid, out)
    of_rows = {
        label: {k: repr(v) for k, v in run.settings.leaves().items() if k != "train.run_dir"}
        for label, run in first.items()
    }
    known = _read(out / THROUGHPUT)
    if known.get("of") != of_rows:
        worker = Worker(places[0], grid.imports)
        try:
            taken = worker.seconds_per_step([run.settings for run in first.values()])
        finally:
            worker.close()
        known = {"seconds": dict(zip(first, taken, strict=True)), "of": of_rows}
        files.write_json(out / THROUGHPUT, known, indent=1)
    return known["seconds"]


def _first(grid: Grid, out: Path) -> dict[str, Run]:
    """A run of each row, by label."""
    return {run.row.label: run for run in grid.runs(out) if run.seed == grid.seeds[0]}


def _check_same(run: Run) -> None:
    """Raise ConfigError for a folder that holds a run with other settings.

    Settings that are younger than the run count as by default there.
    """
    if not (run.folder / "config.json").is_file():
        return
    here, there = run.config.leaves(), read_config(run.folder).leaves()
    for key in sorted(here):
        if matters(key) and here[key] != there[key]:
            raise ConfigError(
                f"{run.folder} holds a run with {key}: {there[key]!r} there, "
                f"{here[key]!r} here; give another --out, or move it away"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); move it away") from error


class _Progress:
    """Lines on how far the runs are, by their logs."""

    def __init__(self, runs: Sequence[Run], log: Callable[[str], None]):
        self._runs, self._log = list(runs), log
        self._began, self._told = time.monotonic(), time.monotonic()
        self._work = {run.name: run.flops for run in runs}
        self._before = {run.name: self._work[run.name] * _share(run) for run in runs}
        self._finished: dict[str, float] = {}

    def done(self, run: Run, told: str) -> None:
        self._finished[run.name] = self._work[run.name]
        self._log(f"{len(self._finished)}/{len(self._runs)} {run.name}: {told}")

    def tell(self, running: Sequence[Run]) -> None:
        if not running or time.monotonic() - self._told < EVERY:
            return
        self._told = time.monotonic()
        shares = {run.name: _share(run) for run in running}
        reached = self._finished | {name: self._work[name] * part for name, part in shares.items()}
        new = sum(work - self._before[name] for name, work in reached.items())
        left = sum(self._work.values()) - sum(reached.values())
        left -= sum(self._before[n] for n in self._work if n not in reached)
        seconds = time.monotonic() - self._began
        eta = f"about {duration(seconds * left / new)} left" if new > 0 else "starting"
        told = ", ".join(f"{name} {100 * part:.0f}%" for name, part in shares.items())
        self._log(f"  {duration(seconds)} gone, {eta}: {told}")


def _share(run: Run) -> float:
    """The share of its steps that a run's log has."""
    return _last_entry(run).get("step", 0) / run.config.train.steps


def _last_entry(run: Run) -> dict[str, Any]:
    """The last whole line of a run's log; none where there is no log yet."""
    try:
        with (run.folder / LOG).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 2**17))
            return json.loads(file.read().split(b"\n")[-2])
    except (OSError, IndexError, ValueError):
        return {}
