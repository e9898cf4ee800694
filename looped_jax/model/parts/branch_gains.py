"""A gain for every loop, layer and branch: how much a branch adds in a loop is learned.

f ← (1 + g[loop]) · f of what a branch adds, with g [K, D] zero at the start, one for attention and
one for the MLP of each layer. Beyond the trained K the last loop's gain is used. Source: LayerScale
of Touvron et al., "Going deeper with Image Transformers", 2021 (arXiv 2103.17239), here of loops.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.parts.base import Here, Part, of_loop
from looped_jax.model.weights import weight

Array = jax.Array


@PARTS.register("branch_gains")
class BranchGains(Part):
    """Sites: attention_output, mlp_output."""

    def __init__(self, settings: Any, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs):
        gains = jnp.zeros((config.loops, config.width))
        self.of_attention = weight(gains, None, "embed", group="vector")
        self.of_mlp = weight(gains, None, "embed", group="vector")

    def attention_output(self, x: Array, here: Here) -> Array:
        return x * (1 + of_loop(self.of_attention, here).astype(x.dtype))

    def mlp_output(self, x: Array, here: Here) -> Array:
        return x * (1 + of_loop(self.of_mlp, here).astype(x.dtype))
