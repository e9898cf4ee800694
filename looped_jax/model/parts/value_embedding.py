"""Values that also come from the token itself: a table per layer, looked up once for all loops.

value ← value + table[token], zero at the start, so that a fresh model is what it is without. A
later layer, and every loop, can say what the token was. With a gate it is value + c · σ(W · x) ·
table[token], a factor for each head of values that the first channels of the layer's normed input x
decide: the same table at every visit, another gate.

Source: Zhou et al., "Value Residual Learning", 2024 (arXiv 2410.17897), in the table form of
modded-nanogpt; the gate and tables in alternate layers, the last among them, as in nanochat
(Karpathy, 2026).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import at_least, one_of, setting
from looped_jax.config.registry import PARTS, WEIGHT_GROUPS
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ConfigError
from looped_jax.model.linear import linear
from looped_jax.model.parts.base import Here, Part, PartSettings
from looped_jax.model.weight_groups import WeightGroup
from looped_jax.model.weights import weight

Array = jax.Array
KEY = "model.parts.value_embedding"


@dataclass(frozen=True)
class ValueEmbeddingSettings(PartSettings):
    """Of tables of values, and of their gates."""

    layers: str = one_of(("all", "alternate"), "all", "that have one; alternate: every other, last")
    table_scale: float = at_least(0.0, 0.0, "of a table, at the start U(± scale · √3 / √D)")
    gate: bool = setting(False, "whether the input says how much of it each head adds")
    gate_scale: float = at_least(0.0, 2.0, "c, of the gate")
    gate_channels: int = at_least(1, 32, "first channels of the input, that the gate reads")
    gate_bound: float = at_least(0.0, 0.0, "of its weights, at the start U(0, bound)")


@WEIGHT_GROUPS.register("value_table")
class ValueTableGroup(WeightGroup):
    """Tables of values, as embeddings are."""

    parent = "table"


@PARTS.register("value_embedding")
class ValueEmbedding(Part):
    """Sites: entry (looks up), value (adds). Raises ConfigError for channels that are not there."""

    Settings = ValueEmbeddingSettings

    def __init__(
        self,
        settings: ValueEmbeddingSettings,
        config: ModelConfig,
        layer: int,
        *,
        rngs: nnx.Rngs,
    ):
        channels, self._scale = settings.gate_channels, settings.gate_scale
        if settings.gate and channels > config.width:
            raise ConfigError(
                f"{KEY}.gate_channels={channels} are more than model.width={config.width}; give "
                f"{config.width} or fewer"
            )
        has = settings.layers == "all" or (config.layers - 1 - layer) % 2 == 0
        shape = (config.padded_vocab, config.kv_heads * config.head_dim)
        bound = settings.table_scale * (3 / config.width) ** 0.5
        self.table = (
            weight(_uniform(rngs, shape, -bound, bound), "vocab", "heads", group="value_table")
            if has
            else None
        )
        shape, bound = (channels, config.kv_heads), settings.gate_bound
        self.gate = (
            weight(_uniform(rngs, shape, 0.0, bound), None, "heads")
            if has and settings.gate
            else None
        )

    def entry(self, e: Array, here: Here) -> Array:
        if self.table is not None:
            here.entry["value_embedding", here.layer] = self.table[...][here.tokens].astype(e.dtype)
        return e

    def value(self, x: Array, here: Here) -> Array:
        if self.table is None:
            return x
        own = here.entry["value_embedding", here.layer].reshape(x.shape)
        if self.gate is None:
            return x + own
        read = here.source[..., : self.gate.shape[0]]
        return x + self._scale * jax.nn.sigmoid(linear(read, self.gate[...]))[..., None] * own


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], low: float, high: float) -> Array:
    if low == high:
        return jnp.zeros(shape)  # drawing nothing, so that other parts start as they do without
    return jax.random.uniform(rngs.parts(), shape, minval=low, maxval=high)
