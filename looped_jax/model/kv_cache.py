"""Keys and values of earlier tokens, one slot per loop and layer, so that decoding is exact.

A looped model asks different questions of the same layer in every loop, and the keys differ too:
a cache of one slot per layer forgets all loops but the last. Here every (loop, layer) has its own,
except where a loop rule makes the first layer's keys and values the same in every loop.

N slots, B batch, S cache length, G key/value heads, Dh head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from looped_jax.config import ModelConfig
from looped_jax.model.attention_kernels import Attend
from looped_jax.model.block import Mix
from looped_jax.model.loop_rules import RULES

Array = jax.Array
KINDS = ("exact", "last")


class Cache(NamedTuple):
    """key, value: [N, B, S, G, Dh]. Position p of a sequence lies in column p."""

    key: Array
    value: Array


@dataclass(frozen=True)
class Slots:
    """Where a (loop, layer) keeps its keys and values, and what it may see of the past.

    `exact`: a slot per loop and layer. `last`: a slot per layer that the last loop leaves behind,
    as the PyTorch reference keeps it; earlier loops then see new tokens only, and logits drift.
    """

    loops: int
    layers: int
    shared_first: bool
    exact: bool

    @classmethod
    def of(cls, config: ModelConfig, loops: int, kind: str) -> Slots:
        """Slots of `loops` loops; raises ValueError for an unknown kind."""
        if kind not in KINDS:
            raise ValueError(f"cache={kind!r} is unknown; choose exact or last")
        shared = RULES[config.variant].same_start
        return cls(loops, config.layers, shared, kind == "exact")

    @property
    def count(self) -> int:
        if not self.exact:
            return self.layers
        return self.loops * self.layers - (self.loops - 1) * self.shared_first

    def index(self, loop: Array, layer: int) -> Array:
        """Slot of a traced loop and a static layer."""
        if not self.exact or (self.shared_first and layer == 0):
            return jnp.asarray(layer)
        return loop * (self.layers - self.shared_first) + layer

    def remembers(self, loop: Array) -> Array:
        """Whether this loop sees tokens of earlier calls."""
        return jnp.asarray(self.exact) | (loop == self.loops - 1)


class Past(NamedTuple):
    """What a call that continues sequences is given.

    positions: [B, T] of its new tokens; first: there is no past yet, and all rows start at 0
    """

    cache: Cache
    slots: Slots
    positions: Array
    first: bool = False


def empty(
    config: ModelConfig, *, batch: int, length: int, loops: int, kind: str = "exact"
) -> Cache:
    """A cache for `batch` sequences of up to `length` tokens, in the compute type."""
    assert config.kv_heads
    slots = Slots.of(config, loops, kind).count
    shape = (slots, batch, length, config.kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def bytes_per_token(config: ModelConfig, loops: int, kind: str = "exact") -> int:
    """Cache bytes that one more token of one sequence takes."""
    cache = jax.eval_shape(lambda: empty(config, batch=1, length=1, loops=loops, kind=kind))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in cache)


def remember(past: Past, cache: Cache, loop: Array, layer: int, attend: Attend) -> Mix:
    """Attention of one loop and layer that also sees the cache as it now is, and extends it."""

    def mix(query: Array, key: Array, value: Array, window: int | None) -> tuple[Array, Cache]:
        slot, remembers = past.slots.index(loop, layer), past.slots.remembers(loop)
        extended = _write(cache, key, value, slot, past.positions)
        if past.first:
            return attend(query, key, value, window), extended
        return _look_back(extended, query, slot, past.positions, remembers, window), extended

    return mix


def _write(cache: Cache, key: Array, value: Array, slot: Array, positions: Array) -> Cache:
    """The cache with new keys and values [B, T, G, Dh] at `positions` [B, T] of a slot."""
    rows = jnp.arange(key.shape[0])[:, None]
    return Cache(
        cache.key.at[slot, rows, positions].set(key),
        cache.value.at[slot, rows, positions].set(value),
    )


def _look_back(
    cache: Cache,
    query: Array,
    slot: Array,
    positions: Array,
    remembers: Array,
    window: int | None,
) -> Array:
    """Attention of queries [B, T, H, Dh] at `positions` [B, T] over a slot.

    They see the columns up to their own position. What lies in later columns, left by padding, is
    overwritten before anything can see it.
    """
    columns = jnp.arange(cache.key.shape[2])
    behind = positions[:, :, None] - columns  # [B, T, S]
    visible = (behind >= 0) & (remembers | (columns >= positions[:, :1, None]))
    if window is not None:
        visible &= behind < window
    return jax.nn.dot_product_attention(
        query, cache.key[slot], cache.value[slot], mask=visible[:, None], implementation="xla"
    )
