"""Losses after several loops, each with a weight: Σ w_t CE_t / Σ w_t.

In proportion to the loop, w_t = t, where no weights are given. Source: deep supervision, Lee et
al., "Deeply-Supervised Nets", 2014 (arXiv 1409.5185), here of loops.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from looped_jax.config.options import setting
from looped_jax.config.registry import OBJECTIVES
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ConfigError
from looped_jax.model.objectives.base import Objective

Array = jax.Array


@dataclass(frozen=True)
class WeightedSettings:
    """How much each loop counts."""

    weights: tuple[float, ...] = setting(
        (), "of the loops from first to last, as 0.2,0.3,0.5; by default in proportion to 1, 2, …"
    )


@OBJECTIVES.register("WEIGHTED")
class Weighted(Objective):
    """Every loop that has a weight."""

    Settings = WeightedSettings

    def loops(self, config: ModelConfig) -> tuple[int, ...]:
        weights, last = self._weights(config), config.loops - 1
        return tuple(k for k, weight in enumerate(weights) if weight > 0 or k == last)

    def total(self, config: ModelConfig, nats: Array) -> Array:
        weights = self._weights(config)
        read = jnp.array([weights[k] for k in self.loops(config)], nats.dtype)
        return (read * nats).sum() / sum(weights)

    def _weights(self, config: ModelConfig) -> tuple[float, ...]:
        weights = config.objectives["WEIGHTED"].weights or tuple(range(1, config.loops + 1))
        if len(weights) != config.loops or min(weights) < 0 or sum(weights) == 0:
            raise ConfigError(
                f"model.objectives.WEIGHTED.weights={','.join(map(str, weights))} with "
                f"model.loops={config.loops}; give {config.loops} numbers from 0, not all of them 0"
            )
        return weights
