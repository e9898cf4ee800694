"""A row of one matrix for each token, a column of another for each logit; base of all embeddings.

A model keeps the weights as `embed` and `head`; under these names they stand in checkpoints.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from looped_jax.config.registry import EMBEDDINGS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.linear import linear
from looped_jax.model.weights import weight

Array = jax.Array


@EMBEDDINGS.register("separate")
class Separate:
    """Two matrices, each of its own."""

    def __init__(self, config: ModelConfig):
        self.config = config

    def embed(self, rngs: nnx.Rngs) -> Any:
        """Weights that tokens are looked up in, one or an nnx.Module of some."""
        return weight(self._rows(rngs, self.config.width), "vocab", "embed", group="table")

    def head(self, rngs: nnx.Rngs) -> Any:
        """Weights that states are read out by, or None; drawn after those of the layers."""
        return weight(self._columns(rngs, self.config.width), "embed", "vocab", group="head")

    def look_up(self, tokens: Array, embed: Any) -> Array:
        """Vectors [B, T, D] of tokens [B, T], in the compute type."""
        return embed[...][tokens].astype(self.config.dtype)

    def read_out(self, h: Array, embed: Any, head: Any) -> Array:
        """Float32 logits [..., Vp] of states [..., D], before the soft cap."""
        return linear(h, head[...], "float32")

    def _rows(self, rngs: nnx.Rngs, size: int, std: float = 1.0) -> Array:
        """[Vp, size] of model.init.embedding_std, by default `std`."""
        given = self.config.init.embedding_std
        std = std if given is None else given
        return std * jax.random.normal(rngs.params(), (self.config.padded_vocab, size))

    def _columns(self, rngs: nnx.Rngs, size: int) -> Array:
        """[size, Vp], by default so small that all tokens begin as equally likely."""
        return self.config.init.head_std * jax.random.normal(
            rngs.params(), (size, self.config.padded_vocab)
        )
