"""Injection by a learned matrix: a loop starts from [h; norm(e)] · W.

W [2D, D] is kept as its two halves, x = h · W_h + norm(e) · W_e, which start as multiples of the
identity: by default as the state alone, which is LT. Source: `linear` among the injections of
Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025 (arXiv 2502.05171).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import setting
from looped_jax.config.registry import LOOP_RULES
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.linear import linear
from looped_jax.model.loop_rules.base import LoopRule
from looped_jax.model.parts.base import Here
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class LinearSettings:
    """What the two halves start as, times the identity."""

    state: float = setting(1.0, "W_h at the start")
    embedding: float = setting(0.0, "W_e at the start")


@LOOP_RULES.register("linear")
class Linear(LoopRule):
    """A loop starts from a learned mix of embedding and state."""

    Settings = LinearSettings

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        settings, identity = config.rules["linear"], jnp.eye(config.width)
        self.of_state = weight(settings.state * identity, "embed", None)
        self.of_embedding = weight(settings.embedding * identity, "embed", None)

    def start(self, here: Here) -> Array:
        e = here.x0
        mixed = linear(here.h, self.of_state[...]) + linear(e, self.of_embedding[...])
        return jnp.where(here.first, e, mixed)
