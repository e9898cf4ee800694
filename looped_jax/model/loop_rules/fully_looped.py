"""The five rules of the paper: plain loops, loops that re-read the embedding, fully looped ones.

Source: "Simply Stabilizing the Loop via Fully Looped Transformer", arXiv 2605.18797.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.registry import LOOP_RULES
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.loop_rules.base import LoopRule
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.base import Here

Array = jax.Array


@LOOP_RULES.register("FLT")
class FullyLooped(LoopRule):
    """Every layer asks with the previous loop's output; keys and values come from x alone.

    So a loop can change where a token looks, but cannot add content directly.
    """

    same_start = True

    def inject(self, x: Array, here: Here) -> tuple[Array, Array]:
        return x, jnp.where(here.first, x, here.h)


@LOOP_RULES.register("FLT_res")
class FullyLoopedResidual(LoopRule):
    """Every layer first adds the previous loop's output to its stream."""

    def inject(self, x: Array, here: Here) -> tuple[Array, Array]:
        x = jnp.where(here.first, x, rms_norm(x + here.h))
        return x, x


@LOOP_RULES.register("LT_ia")
class InjectedAttention(LoopRule):
    """The first layer asks with the previous loop's output."""

    same_start = True

    def inject(self, x: Array, here: Here) -> tuple[Array, Array]:
        return x, jnp.where(here.first, x, here.h) if here.layer == 0 else x


@LOOP_RULES.register("LT_i")
class Injected(LoopRule):
    """A loop starts from embedding and state together."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self._normed = config.norm.embedding

    def start(self, here: Here) -> Array:
        x = rms_norm(here.e + here.h)  # h is zero in the first loop
        return x if self._normed else jnp.where(here.first, here.e, x)


@LOOP_RULES.register("LT")
class Plain(LoopRule):
    """A loop goes on with the state."""

    rereads_embedding = False

    def start(self, here: Here) -> Array:
        return jnp.where(here.first, here.x0, here.h)
