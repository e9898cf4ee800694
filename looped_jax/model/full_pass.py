"""What a place in the model knows of other tokens in a full pass: attention, and shifts in time.

model/kv_cache.py has the same two verbs for decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from looped_jax.model.attention_kernels import Attend, plain
from looped_jax.model.probe import BLIND, View

Array = jax.Array


class FullPass:
    """The history of whole rows that begin at position 0, the same for every loop and layer.

    With a view that wants attention weights, a layer's own attention shows them.
    """

    cache: None = None  # nothing is kept
    writes = False

    def __init__(self, attend: Attend, view: View = BLIND):
        self._attend, self._view = attend, view

    def open(self, loop: Array | None, layer: int | None) -> FullPass:
        """The history of a place; see kv_cache.Pages."""
        if layer is not None and self._view.wants("weights"):
            return WithWeights(functools.partial(self._view, "weights", layer))
        return self

    def attend(self, query: Array, key: Array, value: Array, window: int | None) -> Array:
        return self._attend(query, key, value, window)

    def previous(self, name: str, x: Array, offset: int) -> Array:
        return shifted(x, offset)

    def at(self, place: str) -> FullPass:
        return self

    def with_weights(self, act: Callable[[Array], Array]) -> FullPass:
        return WithWeights(act)


class WithWeights(FullPass):
    """A full pass that hands the attention weights [B, H, T, T] to `see`, and uses its answer."""

    def __init__(self, see: Callable[[Array], Array]):
        super().__init__(self._attend_with_weights)
        self._see = see

    def at(self, place: str) -> FullPass:
        return FullPass(plain)  # the layer's own attention is shown, not that of parts

    def with_weights(self, act: Callable[[Array], Array]) -> FullPass:
        return WithWeights(lambda weights: self._see(act(weights)))

    def _attend_with_weights(
        self, query: Array, key: Array, value: Array, window: int | None
    ) -> Array:
        heads = query.shape[2]
        key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
        weights = self._see(attention_weights(query, key, window))
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


def shifted(x: Array, offset: int) -> Array:
    """x [B, T, …] as it was `offset` positions earlier, zero before the first."""
    if offset == 0:
        return x
    padding = [(0, 0), (offset, 0), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, padding)[:, : x.shape[1]]


def attention_weights(query: Array, key: Array, window: int | None) -> Array:
    """Float32 [B, H, T, T] of queries and keys [B, T, H, Dh]: causal, sums to 1 over the last."""
    time, head_dim = query.shape[1], query.shape[3]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    behind = jnp.arange(time)[:, None] - jnp.arange(time)
    visible = (behind >= 0) & (behind < (window or time))
    return jax.nn.softmax(jnp.where(visible, scores / head_dim**0.5, -jnp.inf), axis=-1)
