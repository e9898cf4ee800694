"""A gate that says of a state whether its token may leave the loops.

λ = σ(w · h + b) after each loop, with w [D] and b zero at the start. It changes no output; the
objectives EXIT and EXIT_GATE train it. Source: Zhu et al., "Scaling Latent Reasoning via Looped
Language Models", 2025 (arXiv 2510.25741).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.parts.base import Here, Part
from looped_jax.model.weights import weight

Array = jax.Array


@PARTS.register("exit_gate")
class ExitGate(Part):
    """Site: stop."""

    each_layer = False

    def __init__(self, settings: Any, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs):
        self.scale = weight(jnp.zeros((config.width,)), "embed", group="vector")
        self.bias = weight(jnp.zeros((1,)), None, group="vector")

    def stop(self, z: Array, here: Here) -> Array:
        return z + here.h.astype(z.dtype) @ self.scale[...].astype(z.dtype) + self.bias[0]
