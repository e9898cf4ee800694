"""Biases in the products of a layer: y = x W + b.

b is zero at the start, one for each matrix of attention and MLP, in layers of prelude and coda too.
Embedding and head have none. Source: GPT-2 (Radford et al., "Language Models are Unsupervised
Multitask Learners", 2019), which has them everywhere.
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


@PARTS.register("biases")
class Biases(Part):
    """Site: product."""

    in_unlooped = True

    def __init__(self, settings: Any, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs):
        width, kv_width = config.width, config.kv_heads * config.head_dim
        sizes = {
            "query": (config.attention_width, "heads"),
            "key": (kv_width, "heads"),
            "value": (kv_width, "heads"),
            "out": (width, "embed"),
            "up": (4 * width, "mlp"),
            "down": (width, "embed"),
        }
        if config.attention == "mla":
            sizes["latent"] = (config.latent_rank, "latent")
        self.of = nnx.Dict(
            {
                n: weight(jnp.zeros((size,)), axis, group="vector")
                for n, (size, axis) in sizes.items()
            }
        )

    def product(self, y: Array, here: Here) -> Array:
        return y + self.of[here.matrix][...].astype(y.dtype)
