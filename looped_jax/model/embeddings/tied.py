"""One matrix for both: the logit of a token is the product of a state and the token's own vector.

z = h · tableᵀ, the table drawn small, as in GPT-2. It is updated at the rate of the embedding,
`optim.embedding_learning_rate`, whose default is for a table that no state is read out by.

Source: Press and Wolf, "Using the Output Embedding to Improve Language Models", 2016 (arXiv
1608.05859).
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from looped_jax.config.registry import EMBEDDINGS
from looped_jax.model.embeddings.separate import Separate
from looped_jax.model.linear import linear
from looped_jax.model.weights import weight

Array = jax.Array


@EMBEDDINGS.register("tied")
class Tied(Separate):
    """One matrix that tokens are looked up in and states are read out by."""

    def embed(self, rngs: nnx.Rngs) -> Any:
        table = self._rows(rngs, self.config.width, std=0.02)
        return weight(table, "vocab", "embed", group="table")

    def head(self, rngs: nnx.Rngs) -> Any:
        return None

    def read_out(self, h: Array, embed: Any, head: Any) -> Array:
        return linear(h, embed[...].T, "float32")
