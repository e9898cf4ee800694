"""Values that also come from the token itself: a table per layer, looked up once for all loops.

value ← value + table[token], zero at the start, so that a fresh model is what it is without. A
later layer, and every loop, can say what the token was. Source: Zhou et al., "Value Residual
Learning", 2024 (arXiv 2410.17897), in the table form of modded-nanogpt; here without a gate.
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


@PARTS.register("value_embedding")
class ValueEmbedding(Part):
    """Sites: entry (looks up), value (adds)."""

    def __init__(self, settings: Any, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs):
        table = jnp.zeros((config.padded_vocab, config.kv_heads * config.head_dim))
        self.table = weight(table, "vocab", "heads", group="table")

    def entry(self, e: Array, here: Here) -> Array:
        here.entry["value_embedding", here.layer] = self.table[...][here.tokens].astype(e.dtype)
        return e

    def value(self, x: Array, here: Here) -> Array:
        return x + here.entry["value_embedding", here.layer].reshape(x.shape)
