"""Embeddings that hold a share of the one before: what an attention head would look up first.

x_t ← x_t + λ · σ(w · x_t) · x_{t−1}, once, before the loops, of x = norm(e); w reads the first
channels, and x_{t−1} is that without a share of x_{t−2}. Loops start from the sum as it is, not
normed again, but for rules that norm more than the embedding, as LT_i. λ is 0 at the start.

Source: nanochat (Karpathy, 2026) after modded-nanogpt.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import at_least, setting
from looped_jax.config.registry import PARTS, WEIGHT_GROUPS
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ConfigError
from looped_jax.model.linear import linear
from looped_jax.model.parts.base import NORMED, Here, Part, PartSettings
from looped_jax.model.weight_groups import WeightGroup
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class SmearSettings(PartSettings):
    """Of the share of the token before."""

    channels: int = at_least(1, 24, "first channels of the embedding, that the gate reads")
    start: float = setting(0.0, "λ at the start")
    gate_bound: float = at_least(0.0, 0.02, "of the gate's weights, at the start U(0, bound)")


@WEIGHT_GROUPS.register("smear")
class SmearGroup(WeightGroup):
    """Gate and strength of the smear."""


@PARTS.register("smear")
class Smear(Part):
    """Site: entry. Raises ConfigError for more channels than there are."""

    Settings = SmearSettings
    each_layer = False

    def __init__(
        self, settings: SmearSettings, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs
    ):
        if settings.channels > config.width:
            raise ConfigError(
                f"model.parts.smear.channels={settings.channels} are more than model.width="
                f"{config.width}; give {config.width} or fewer"
            )
        shape = (settings.channels, 1)
        start = jax.random.uniform(rngs.parts(), shape, maxval=settings.gate_bound)
        self.gate = weight(start, None, None, group="smear")
        self.scale = weight(jnp.full((1,), settings.start), None, group="smear")

    def entry(self, e: Array, here: Here) -> Array:
        x = here._replace(e=e).x0
        before = here.history.previous("x", x, 1)
        gate = jax.nn.sigmoid(linear(x[..., : self.gate.shape[0]], self.gate[...]))
        here.entry[NORMED] = True
        return (x + self.scale[...] * gate * before).astype(x.dtype)
