"""A learned vector for every loop, added to the stream at its start: a loop knows which it is.

x ← x + v[loop], with v [K, D] zero at the start. Beyond the trained K the last loop's vector is
used. Source: the time-step embedding of Dehghani et al., "Universal Transformers", 2018 (arXiv
1807.03819), learned instead of sinusoidal.
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


@PARTS.register("loop_embedding")
class LoopEmbedding(Part):
    """Site: loop_start."""

    each_layer = False

    def __init__(self, settings: Any, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs):
        vectors = jnp.zeros((config.loops, config.width))
        self.vectors = weight(vectors, None, "embed", group="vector")

    def loop_start(self, x: Array, here: Here) -> Array:
        return x + of_loop(self.vectors, here).astype(x.dtype)
