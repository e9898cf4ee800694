"""Keys and values of earlier tokens, one slot per loop and layer, so that decoding is exact.

A looped model asks different questions of the same layer in every loop, and the keys differ too:
a cache of one slot per layer forgets all loops but the last. Here every (loop, layer) has its own,
except where a loop rule makes the first layer's keys and values the same in every loop.

N slots, B batch, S cache length, G key/value heads, Dh head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from looped_jax.config import ModelConfig
from looped_jax.errors import ArgumentError
from looped_jax.model.attention_kernels import Attend
from looped_jax.model.history import shifted
from looped_jax.registry import LOOP_RULES

Array = jax.Array
Cache = dict[str, Array]  # "key", "value": [N, B, S, G, Dh]; a part's stream: [places, B, S, …]
CACHE_TYPES = ("exact", "last")


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
        """Slots of `loops` loops; raises ArgumentError for an unknown kind."""
        if kind not in CACHE_TYPES:
            raise ArgumentError(f"cache={kind!r} is unknown; choose exact or last")
        shared = LOOP_RULES[config.variant].same_start and not config.parts.on()
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

    @property
    def places(self) -> int:
        """Slots of a stream that a part looks back at: never shared."""
        return self.layers * (self.loops if self.exact else 1)

    def place(self, loop: Array, layer: int) -> Array:
        """Slot of such a stream."""
        return loop * self.layers + layer if self.exact else jnp.asarray(layer)

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


class Pages:
    """The cache as one loop finds it, and leaves it once its layers have written to it."""

    def __init__(self, past: Past, cache: Cache):
        self.past, self.cache = past, dict(cache)

    def at(self, loop: Array, layer: int, attend: Attend) -> Page:
        """The history of one layer in one loop."""
        slots = self.past.slots
        return Page(self, attend, slots.index(loop, layer), slots.place(loop, layer),
                    slots.remembers(loop), f"layer.{layer}")  # fmt: skip

    def at_entry(self, attend: Attend) -> Page:
        """The history before the loops."""
        first = jnp.asarray(0)
        return Page(self, attend, first, first, jnp.asarray(True), "entry")


class Page:
    """The history of one layer in one loop while decoding: writes to the cache, reads from it."""

    def __init__(
        self, pages: Pages, attend: Attend, slot: Array, place: Array, remembers: Array, where: str
    ):
        self._pages, self._attend, self._where = pages, attend, where
        self._slot, self._place, self._remembers = slot, place, remembers
        self._written: set[str] = set()

    def attend(self, query: Array, key: Array, value: Array, window: int | None) -> Array:
        past = self._pages.past
        self._write("key", key, self._slot)
        self._write("value", value, self._slot)
        if past.first:
            return self._attend(query, key, value, window)
        cache = self._pages.cache
        return _look_back(
            cache["key"][self._slot], cache["value"][self._slot], query, past.positions,
            self._remembers, window,
        )  # fmt: skip

    def previous(self, name: str, x: Array, offset: int) -> Array:
        past, name = self._pages.past, f"{self._where.split('.')[0]}.{name}"
        if name not in self._written:
            self._write(name, x, self._place)
            self._written.add(name)
        if past.first:
            return shifted(x, offset)
        rows = jnp.arange(len(x))[:, None]
        source = past.positions - offset
        found = self._pages.cache[name][self._place, rows, jnp.maximum(source, 0)]
        known = (source >= 0) & (self._remembers | (source >= past.positions[:, :1]))
        return jnp.where(known.reshape(*known.shape, *[1] * (x.ndim - 2)), found, 0)

    def _write(self, name: str, x: Array, slot: Array) -> None:
        cache, rows = self._pages.cache, jnp.arange(len(x))[:, None]
        cache[name] = cache[name].at[slot, rows, self._pages.past.positions].set(x)


def empty(
    config: ModelConfig,
    streams: Mapping[str, jax.ShapeDtypeStruct],
    *,
    batch: int,
    length: int,
    loops: int,
    kind: str = "exact",
) -> Cache:
    """A cache for `batch` sequences of up to `length` tokens, in the compute type.

    `streams` are what parts look back at, as transformer.streams finds them: [1, 1, …] each.
    """
    assert config.kv_heads
    slots = Slots.of(config, loops, kind)
    shape = (slots.count, batch, length, config.kv_heads, config.head_dim)
    cache = {name: jnp.zeros(shape, config.dtype) for name in ("key", "value")}
    for name, stream in streams.items():
        places = 1 if name.startswith("entry.") else slots.places
        cache[name] = jnp.zeros((places, batch, length, *stream.shape[2:]), stream.dtype)
    return cache


def spec(name: str) -> P:
    """How a mesh cuts a stream of the cache: rows over the batch axes, heads over `tensor`."""
    rows = P(None, ("data", "fsdp"))
    return P(*rows, None, "tensor") if name in ("key", "value") else rows


class Finder:
    """The history that finds out what a model looks back at, in one abstract pass."""

    def __init__(self, found: dict[str, jax.ShapeDtypeStruct], where: str):
        self._found, self._where = found, where

    def attend(self, query: Array, key: Array, value: Array, window: int | None) -> Array:
        return query

    def previous(self, name: str, x: Array, offset: int) -> Array:
        self._found[f"{self._where}.{name}"] = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return x


def _look_back(
    key: Array,
    value: Array,
    query: Array,
    positions: Array,
    remembers: Array,
    window: int | None,
) -> Array:
    """Attention of queries [B, T, H, Dh] at `positions` [B, T] over a slot [B, S, G, Dh].

    They see the columns up to their own position. What lies in later columns, left by padding, is
    overwritten before anything can see it.
    """
    columns = jnp.arange(key.shape[1])
    behind = positions[:, :, None] - columns  # [B, T, S]
    visible = (behind >= 0) & (remembers | (columns >= positions[:, :1, None]))
    if window is not None:
        visible &= behind < window
    return jax.nn.dot_product_attention(
        query, key, value, mask=visible[:, None], implementation="xla"
    )
