"""A loop rule: what the state of the previous loop does to the next one.

A rule says how a loop starts and what its layers take from the previous loop. `here`, see
model/parts/base.py, holds h, the state after the previous loop, zero in the first one; e, the
embedding before normalisation, and x0 = norm(e); and the indices of loop and layer. In the first
loop every rule is a plain transformer, unless a part gives the state before it. All are [B, T, D].

To try an idea, register a rule, here or in a file of your own: it is then a choice of
`model.variant` and in every test that runs over all rules.
"""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import nnx

from looped_jax.config.resolved import ModelConfig
from looped_jax.model.parts.base import Here

Array = jax.Array


class LoopRule(nnx.Module):
    """Each loop starts anew from the embedding and learns nothing of the loop before.

    same_start: the first layer's stream, and so its keys and values, are the same in every loop
    rereads_embedding: whether loops after the first read it, not the state alone
    draws: whether it asks for random numbers, by here.draw
    """

    same_start: ClassVar[bool] = False
    rereads_embedding: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """A rule may make weights of its own; see model/weights.py."""

    def start(self, here: Here) -> Array:
        """The stream at the start of a loop."""
        return here.x0

    def inject(self, x: Array, here: Here) -> tuple[Array, Array]:
        """Before each layer: the stream, and what the layer's queries are taken from."""
        return x, x
