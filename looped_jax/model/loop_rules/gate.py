"""Injection by product: a loop starts where embedding and state agree.

x = norm(h ⊙ norm(e)), channel by channel. Source: `gate` among the injections of Geiping et al.,
"Scaling up Test-Time Compute with Latent Reasoning", 2025 (arXiv 2502.05171), there without norms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from looped_jax.config.registry import LOOP_RULES
from looped_jax.model.loop_rules.base import LoopRule
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.base import Here

Array = jax.Array


@LOOP_RULES.register("gate")
class Gate(LoopRule):
    """A loop starts from the product of embedding and state."""

    def start(self, here: Here) -> Array:
        e = here.x0
        return jnp.where(here.first, e, rms_norm(here.h * e))
