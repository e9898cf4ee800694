"""What each branch adds to the stream, scaled down by the number of loops and layers.

x ← x + ε · f(norm(x)) with ε = factor / (K ** loops_power · L ** layers_power), by default
1 / (K · √L): the stream then grows alike at any depth, and the best learning rate does not move
with K. K is the trained one, whatever number of loops is run, so that loop 3 of 4 is loop 3 of 12.
It is the plain model where both powers are 0.

Source: arXiv 2606.18524, which has λ / (K · √L); powers of 1/2 for both are 1 / √(K · L).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from looped_jax.config.options import at_least
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.parts.base import Here, Part, PartSettings

Array = jax.Array


@dataclass(frozen=True)
class ResidualScaleSettings(PartSettings):
    """Of the scale of all branches."""

    factor: float = at_least(0.0, 1.0, "λ, of every branch")
    loops_power: float = at_least(0.0, 1.0, "of 1 / K, the trained number of loops")
    layers_power: float = at_least(0.0, 0.5, "of 1 / L")


@PARTS.register("residual_scale")
class ResidualScale(Part):
    """Sites: attention_output, mlp_output."""

    Settings = ResidualScaleSettings
    starts_as_identity = False

    def __init__(
        self,
        settings: ResidualScaleSettings,
        config: ModelConfig,
        layer: int | None,
        *,
        rngs: nnx.Rngs,
    ):
        depth = config.loops**settings.loops_power * config.layers**settings.layers_power
        self._scale = settings.factor / depth

    def attention_output(self, x: Array, here: Here) -> Array:
        return x * self._scale

    def mlp_output(self, x: Array, here: Here) -> Array:
        return x * self._scale
