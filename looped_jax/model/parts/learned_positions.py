"""A learned vector for every position, added to the embedding once, before the loops.

e ← e + table[position], with table [length, D] normal at the start. Longer rows are refused, as no
vector is known for them. Usually with model.rope.on=False, for rotary positions come on top.

Source: GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import at_least
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ConfigError
from looped_jax.model.parts.base import Here, Part, PartSettings
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class LearnedPositionsSettings(PartSettings):
    """Of the table of positions."""

    length: int | None = at_least(1, None, "positions that have one; by default model.seq_len")
    std: float = at_least(0.0, 0.02, "normal, at the start")

    def longest_row(self, seq_len: int) -> int:
        return self.length or seq_len


@PARTS.register("learned_positions")
class LearnedPositions(Part):
    """Site: entry. Raises ConfigError for a table that is shorter than the rows of training."""

    Settings = LearnedPositionsSettings
    each_layer = False
    starts_as_identity = False

    def __init__(
        self,
        settings: LearnedPositionsSettings,
        config: ModelConfig,
        layer: int | None,
        *,
        rngs: nnx.Rngs,
    ):
        length = settings.longest_row(config.seq_len)
        if length < config.seq_len:
            raise ConfigError(
                f"model.parts.learned_positions.length={length} is shorter than rows of model."
                f"seq_len={config.seq_len}; raise it, or leave it out"
            )
        start = settings.std * jax.random.normal(rngs.parts(), (length, config.width))
        self.table = weight(start, None, "embed", group="table")

    def entry(self, e: Array, here: Here) -> Array:
        # Only what fills a row up lies beyond the table.
        known = jnp.minimum(here.positions, len(self.table[...]) - 1)
        return e + self.table[...][known].astype(e.dtype)
