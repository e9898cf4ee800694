"""A trace of a few training steps, for TensorBoard's profile page, XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from looped_jax.errors import ConfigError


class Profile:
    """Records the steps of `steps`, as "10:13" both included, into <folder>/plugins/profile.

    Scopes carry the names of the model's parts: layer_0/attention, mlp, head, loss, optimizer.
    Raises ConfigError for anything else than two step numbers in order.
    """

    def __init__(self, steps: str | None, folder: Path):
        self._first = self._last = 0
        self._folder, self._running = folder, False
        if steps is None:
            return
        first, _, last = steps.partition(":")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise ConfigError(
                f"--profile_steps={steps!r} is no range of steps; give first and last, as 10:13"
            )
        self._first, self._last = int(first), int(last)

    def before(self, step: int) -> None:
        """Call before `step` is dispatched."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, outputs: Any) -> Path | None:
        """Call once `step` is dispatched; the folder when its trace is complete."""
        if not self._running or step != self._last:
            return None
        jax.block_until_ready(outputs)
        self.close()
        return self._folder / "plugins" / "profile"

    def close(self) -> None:
        """Write what was recorded, also when the run ends early."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
