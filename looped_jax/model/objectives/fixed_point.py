"""The last loop's loss, and a penalty on how far the last loop still moves the state.

CE_K + weight · mean((h_K − h_{K−1})²) over channels, for each token that is counted: a model whose
state comes to rest goes on being right when it is run for longer than it was trained. Source:
arXiv 2608.18222, which has the weight and penalises the last step; the mean square is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from looped_jax.config.options import at_least
from looped_jax.config.registry import OBJECTIVES
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ConfigError
from looped_jax.model.objectives.base import Batch, Objective, Params, counted

Array = jax.Array


@dataclass(frozen=True)
class FixedPointSettings:
    """Of the penalty on the last step."""

    weight: float = at_least(0.0, 0.05, "of the mean square of the last change of state")


@OBJECTIVES.register("FIXED_POINT")
class FixedPoint(Objective):
    """The last loop, which should change nothing more; the one before is read and logged."""

    Settings = FixedPointSettings

    def loops(self, config: ModelConfig) -> tuple[int, ...]:
        if config.loops < 2:
            raise ConfigError(
                f"model.loops={config.loops} leaves model.loss=FIXED_POINT no two loops to "
                "compare; raise it, or choose model.loss=END"
            )
        return (config.loops - 2, config.loops - 1)

    def total(self, config: ModelConfig, nats: Array) -> Array:
        return nats[-1]

    def loss(
        self, config: ModelConfig, params: Params, hidden: Array, batch: Batch
    ) -> tuple[Array, Array]:
        total, nats = super().loss(config, params, hidden, batch)
        before, after = hidden.astype(jnp.float32)
        moved = jnp.square(after - before).mean(-1)
        penalty = jnp.where(counted(batch), moved, 0.0).sum()
        return total + config.objectives["FIXED_POINT"].weight * penalty, nats
