"""Injection by a stable linear system: every channel forgets at a rate of its own, and is fed.

x = exp(−Δ ⊙ A) ⊙ h + Δ ⊙ (norm(e) · B) with A = exp(log_rate) and Δ = softplus(step), both [D], and
B [D, D]. Whatever is learned, the decay exp(−Δ ⊙ A) lies between 0 and 1, so that no loop makes the
state grow. At the start A = 1, B = I and the decay is `decay` in every channel.

Source: Prairie et al., "Parcae: Scaling Laws for Stable Looped Language Models", 2026, whose first
loop too starts so, from a random state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import at_least
from looped_jax.config.registry import LOOP_RULES
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.linear import linear
from looped_jax.model.loop_rules.base import LoopRule
from looped_jax.model.parts.base import Here
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class DiagonalSettings:
    """Of the linear system between loops."""

    decay: float = at_least(
        0.001, 0.2**0.5, "share of the state that a loop starts with, at first", high=0.999
    )


@LOOP_RULES.register("diagonal")
class Diagonal(LoopRule):
    """A loop starts from a share of the state, learned by channel, and the embedding."""

    Settings = DiagonalSettings

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.width
        step = -math.log(config.rules["diagonal"].decay)
        inverse = math.log(math.expm1(step))  # softplus of it is the step
        self.log_rate = weight(jnp.zeros((width,)), "embed", group="vector")
        self.step = weight(jnp.full((width,), inverse), "embed", group="vector")
        self.input = weight(jnp.eye(width), "embed", None)

    def start(self, here: Here) -> Array:
        e, step = here.x0, jax.nn.softplus(self.step[...])
        decay = jnp.exp(-step * jnp.exp(self.log_rate[...])).astype(e.dtype)
        x = decay * here.h + step.astype(e.dtype) * linear(e, self.input[...])
        return jnp.where(here.first, e, x)
