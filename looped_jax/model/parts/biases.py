"""Biases in the products of a layer: y = x W + b.

b is zero at the start, one for each matrix of MLP and, unless `attention` is off, of attention, in
layers of prelude and coda too. Embedding and head have none.

Source: GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019), which
has them everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import setting
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.parts.base import Here, Part, PartSettings
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class BiasesSettings(PartSettings):
    """Which products have one."""

    attention: bool = setting(True, "those of attention, too; else the MLP's alone")


@PARTS.register("biases")
class Biases(Part):
    """Site: product."""

    Settings = BiasesSettings
    in_unlooped = True

    def __init__(
        self, settings: BiasesSettings, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs
    ):
        width, kv_width = config.width, config.kv_heads * config.head_dim
        sizes = {"up": (4 * width, "mlp"), "down": (width, "embed")}
        if settings.attention:
            sizes |= {
                "query": (config.attention_width, "heads"),
                "key": (kv_width, "heads"),
                "value": (kv_width, "heads"),
                "out": (width, "embed"),
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
        if here.matrix not in self.of:
            return y
        return y + self.of[here.matrix][...].astype(y.dtype)
