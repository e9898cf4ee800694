"""The three objectives of the paper: token losses after the last loop, the last third, or all.

Source: "Simply Stabilizing the Loop via Fully Looped Transformer", arXiv 2605.18797.
"""

from __future__ import annotations

from looped_jax.config.registry import OBJECTIVES
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.objectives.base import Objective


@OBJECTIVES.register("END")
class End(Objective):
    """The last loop alone."""


@OBJECTIVES.register("FEW")
class Few(Objective):
    """The last third of the loops."""

    def loops(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(range(2 * config.loops // 3, config.loops))


@OBJECTIVES.register("STEP")
class Step(Objective):
    """Every loop."""

    def loops(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(range(config.loops))
