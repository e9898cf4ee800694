"""An alarm for a run that stands still: it says which process was last seen where."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from looped_jax import files
from looped_jax.training.progress import Console

FOLDER = "stalls"  # of the run folder; there is nothing in it while the run goes on
FOR_DEVICES = "waiting for devices"  # which wait for all processes
SHOWN = 5  # places that are spelt out
_PATIENCE = 10.0  # seconds for the thread to end
_OFTEN = 5.0  # seconds between two looks, at most


class _Place(NamedTuple):
    step: int
    doing: str
    since: float


class StallAlarm:
    """A thread that looks whether the run has gone on; telling it where it is costs no more.

    A process that stands at one place for longer than `minutes` writes it to stalls/<process>.json,
    which needs no other process to go on; process 0 writes nothing, but reads what the others have
    written and tells it, again when it has been twice as long. Whoever goes on removes what it
    wrote.
    """

    def __init__(
        self,
        run_dir: str | Path,
        minutes: float,
        names: Sequence[str],
        log: Console,
        *,
        process: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`names` of all processes, of which this is number `process`; 0 minutes: no alarm."""
        self._names, self._limit, self._log, self._clock = names, 60 * minutes, log, clock
        self._process = jax.process_index() if process is None else process
        self._folder = Path(run_dir) / FOLDER
        self._own = self._folder / f"{self._process}.json"
        self._place = self._seen = _Place(0, "starting", clock())
        self._due = self._limit
        self._every = min(self._limit / 10, _OFTEN)
        self._ended = threading.Event()
        self._own.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._watch, name="stall alarm", daemon=True)
        if self._limit:
            self._thread.start()

    def at(self, step: int, doing: str) -> None:
        """The main thread is now at `step`, `doing` something."""
        self._place = _Place(step, doing, self._clock())

    def close(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)  # it may wait for the disk for ever
        with contextlib.suppress(OSError):  # others may have something in the folder
            self._own.unlink(missing_ok=True)
            self._folder.rmdir()

    def look(self) -> None:
        """Raise the alarm if it is due; the thread does so every few seconds."""
        place, now = self._place, self._clock()
        if place is not self._seen:
            if self._due > self._limit:
                with contextlib.suppress(OSError):
                    self._own.unlink(missing_ok=True)
                self._log(f"it goes on, after {(place.since - self._seen.since) / 60:.1f} minutes")
            self._seen, self._due = place, self._limit
        stood = now - place.since
        if stood < self._due:
            return
        self._due *= 2
        if self._process:
            with contextlib.suppress(OSError):  # the disk may be what it waits for
                files.write_json(self._own, {"step": place.step, "doing": place.doing})
        else:
            self._ended.wait(2 * self._every)  # until the others have written
            self._log(self._report(place, stood))

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            self.look()

    def _report(self, own: _Place, stood: float) -> str:
        places: dict[tuple[int, str], list[str]] = defaultdict(list)
        unheard: list[str] = []
        for process, name in enumerate(self._names):
            found = own._asdict() if process == 0 else _read(self._folder / f"{process}.json")
            if found is None:
                unheard.append(name)
            else:
                places[found["step"], found["doing"]].append(name)
        # those behind come first; of one step those for whom the others wait in a computation
        behind = sorted(places, key=lambda at: (at[0], at[1] == FOR_DEVICES, len(places[at])))
        told = [f"{_few(places[at])} at step {at[0]}, {at[1]}" for at in behind[:SHOWN]]
        if unheard:
            told.append(f"no word from {_few(unheard)}")
        return f"no progress for {stood / 60:.1f} minutes: {'; '.join(told)}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
        return found if {"step", "doing"} <= found.keys() else None
    except (OSError, ValueError):
        return None


def _few(names: Sequence[str]) -> str:
    shown = names if len(names) <= 3 else names[:1]
    return ", ".join(shown) + (f" and {len(names) - 1} others" if len(names) > 3 else "")
