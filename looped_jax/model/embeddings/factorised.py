"""Vectors of r channels for tokens and for logits, widened to D by one matrix each.

e = table[token] · up and z = (h · down) · columns, with table [Vp, r], up [r, D], down [D, r] and
columns [r, Vp]: 2 (Vp + D) r weights instead of 2 Vp D. At the start e has unit variance, as with
separate matrices.

Source: Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations",
2019 (arXiv 1909.11942).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from looped_jax.config.options import at_least
from looped_jax.config.registry import EMBEDDINGS
from looped_jax.model.block import uniform
from looped_jax.model.embeddings.separate import Separate
from looped_jax.model.linear import linear
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class FactorisedSettings:
    """Of an embedding and head of low rank."""

    rank: int = at_least(1, 128, "r, channels of a token, and of a logit")


@EMBEDDINGS.register("factorised")
class Factorised(Separate):
    """Two matrices of low rank, each a product."""

    Settings = FactorisedSettings

    def embed(self, rngs: nnx.Rngs) -> Any:
        rank = self.config.embeddings["factorised"].rank
        return nnx.Dict(
            table=weight(self._rows(rngs, rank), "vocab", "latent", group="table"),
            up=weight(uniform(rngs, rank, self.config.width), "latent", "embed"),
        )

    def head(self, rngs: nnx.Rngs) -> Any:
        rank = self.config.embeddings["factorised"].rank
        return nnx.Dict(
            down=weight(uniform(rngs, self.config.width, rank), "embed", "latent"),
            columns=weight(self._columns(rngs, rank), "latent", "vocab", group="head"),
        )

    def look_up(self, tokens: Array, embed: Any) -> Array:
        return linear(embed.table[...][tokens].astype(self.config.dtype), embed.up[...])

    def read_out(self, h: Array, embed: Any, head: Any) -> Array:
        return linear(linear(h, head.down[...]), head.columns[...], "float32")
