"""How each process of a run fares: the time it waits for rows, its step time, its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from looped_jax.runtime import distributed
from looped_jax.training.progress import memory_in_use

QUANTITIES = ("data_wait_seconds", "step_seconds", "memory_bytes")


class Spread(NamedTuple):
    """Of one quantity over all processes."""

    mean: float
    worst: float
    process: int  # whose it is


@dataclass(frozen=True)
class Gathered:
    """The spread of each of QUANTITIES, over the steps up to `step` since the last such entry."""

    step: int
    spreads: dict[str, Spread]
    names: Sequence[str]  # of the processes, in their order

    def scalars(self) -> dict[str, Any]:
        """As MetricLog.write takes them."""
        return {f"processes/{name}": of._asdict() for name, of in self.spreads.items()}

    def __str__(self) -> str:
        wait, seconds, memory = (self.spreads[name] for name in QUANTITIES)
        parts = (
            f"wait {wait.mean:.3f} {wait.worst:.3f} s ({self.names[wait.process]})",
            f"step {seconds.mean:.3f} {seconds.worst:.3f} s ({self.names[seconds.process]})",
            f"memory {memory.mean / 2**20:,.1f} {memory.worst / 2**20:,.1f} MiB "
            f"({self.names[memory.process]})",
        )
        return f"step {self.step} of {len(self.names)} processes, mean and worst: " + ", ".join(
            parts
        )


class ProcessStats:
    """Sums up the steps of this process, and gathers from all of them without making any wait.

    What is asked for after step t is computed by the devices behind step t + 1, and read with that
    step's metrics. A run of one process has nothing to gather.
    """

    def __init__(self, names: Sequence[str]):
        """`names` of all processes; every process makes one, at the same time."""
        self._names = names
        self._sums, self._steps = np.zeros(2), 0
        self._asked: tuple[int, jax.Array] | None = None
        if len(names) > 1:
            distributed.gather_later(np.zeros(3, np.float32))  # compiled now, not within a step

    def add(self, waited: float, seconds: float) -> None:
        """Count a step that took `seconds`, `waited` of them for its rows."""
        self._sums += waited, seconds
        self._steps += 1

    def ask(self, step: int) -> None:
        """Begin to gather the means since the last time; all processes ask after the same steps."""
        if len(self._names) > 1:
            mine = np.array([*self._sums / self._steps, memory_in_use()], np.float32)
            self._asked = step, distributed.gather_later(mine)
        self._sums, self._steps = np.zeros(2), 0

    def read(self) -> Gathered | None:
        """What was asked for last; None when there is nothing, or it has been read."""
        if self._asked is None:
            return None
        (step, gathered), self._asked = self._asked, None
        found = np.asarray(gathered.addressable_data(0), np.float64)  # [processes, quantities]
        spreads = {
            name: Spread(float(of.mean()), float(of.max()), int(of.argmax()))
            for name, of in zip(QUANTITIES, found.T, strict=True)
        }
        return Gathered(step, spreads, self._names)
