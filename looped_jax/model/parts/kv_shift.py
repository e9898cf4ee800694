"""Keys and values that mix in those of the token before: a learned shift per head.

key_t ← key_t + a · (key_{t−1} − key_t), value likewise, with one a per head, 0 at the start: half
of an induction head without a layer for it. Source: Xu et al., "KV Shifting Attention Enhances
Language Modeling", 2024 (arXiv 2411.19574), there with two free weights; here they sum to 1.
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


@PARTS.register("kv_shift")
class KVShift(Part):
    """Sites: key, value."""

    def __init__(self, settings: Any, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs):
        heads = (config.kv_heads,)
        self.of_key = weight(jnp.zeros(heads), None, group="vector")
        self.of_value = weight(jnp.zeros(heads), None, group="vector")

    def key(self, x: Array, here: Here) -> Array:
        return self._mixed("key", x, here, self.of_key)

    def value(self, x: Array, here: Here) -> Array:
        return self._mixed("value", x, here, self.of_value)

    def _mixed(self, name: str, x: Array, here: Here, share: nnx.Param) -> Array:
        before = here.history.previous(f"kv_shift.{name}", x, 1)
        return x + share[...].astype(x.dtype)[:, None] * (before - x)
