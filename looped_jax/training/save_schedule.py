"""When a run is saved: after so many steps, and after so many minutes."""

from __future__ import annotations

import time
from collections.abc import Callable

from looped_jax.runtime import distributed


class SaveSchedule:
    """Every `every` steps, and once `minutes` have gone by without a save; 0: not by that.

    With several processes the clock of the first decides, for no two clocks agree. To hear from it
    after every step would make each wait for its devices, so it says each time how many steps go by
    until it is asked again: half as many as should fit into the minutes that are left.
    """

    def __init__(
        self, every: int, minutes: float, *, start: int, clock: Callable[[], float] = time.monotonic
    ):
        """`start` is the step that the run goes on from; the first minutes begin now."""
        self._every, self._seconds, self._clock = every, 60 * minutes, clock
        self._start, self._ask = start, start + 1
        self._began = self._saved = clock()

    def due(self, step: int) -> bool:
        """Whether to save after `step`; all processes ask after every step, and agree."""
        late = False
        if self._seconds and step >= self._ask:
            late, ahead = distributed.gather_json(self._look_ahead(step))[0]
            self._ask = step + ahead
        due = late or (self._every > 0 and step % self._every == 0)
        if due:
            self._saved = self._clock()
        return due

    def _look_ahead(self, step: int) -> tuple[bool, int]:
        """Whether the minutes have gone by, and how many steps until this is asked again."""
        now = self._clock()
        left = self._seconds - (now - self._saved)
        late = left <= 0
        per_step = max((now - self._began) / (step - self._start), 1e-6)
        return late, max(1, int((self._seconds if late else left) / per_step / 2))
