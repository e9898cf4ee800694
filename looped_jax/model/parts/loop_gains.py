"""A gain for every loop on the stream at its start, per channel: loops that differ a little.

x ← (1 + g[loop]) · x, with g [K, D] zero at the start. Beyond the trained K the last loop's gain
is used. Source: the per-loop scales of Bae et al., "Relaxed Recursive Transformers", 2024 (arXiv
2410.20672), in their smallest form.
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


@PARTS.register("loop_gains")
class LoopGains(Part):
    """Site: loop_start."""

    each_layer = False

    def __init__(self, settings: Any, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs):
        gains = jnp.zeros((config.loops, config.width))
        self.gains = weight(gains, None, "embed", group="vector")

    def loop_start(self, x: Array, here: Here) -> Array:
        return x * (1 + of_loop(self.gains, here).astype(x.dtype))
