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

from looped_jax.config.registry import LOOP_RULES
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ArgumentError
from looped_jax.model.attention_kernels import Attend
from looped_jax.model.full_pass import shifted

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
    same_start: bool
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
        return self.loops * self.layers - (self.loops - 1) * self.same_start

    def index(self, loop: Array, layer: int) -> Array:
        """Slot of a traced loop and a static layer."""
        if not self.exact or (self.same_start and layer == 0):
            return jnp.asarray(layer)
        return loop * (self.layers - self.same_start) + layer

    def places(self, scope: str) -> int:
        """How many slots a stream of a part has, which are never shared; see scope_of."""
        loops = self.loops if self.exact else 1
        return {"model": 1, "layer": self.layers, "loop": loops, "loop_layer": loops * self.layers}[
            scope
        ]

    def place(self, loop: Array | None, layer: int | None) -> Array:
        """The slot of such a stream."""
        first = jnp.asarray(0)
        loop = first if loop is None or not self.exact else loop
        return loop if layer is None else loop * self.layers + layer

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


def scope_of(loop: Array | None, layer: int | None) -> str:
    """What a place in the model is repeated over: "model", "layer", "loop" or "loop_layer"."""
    parts = (("loop", loop), ("layer", layer))
    return "_".join(name for name, index in parts if index is not None) or "model"


class Pages:
    """The cache as one loop finds it, and leaves it once its layers have written to it."""

    def __init__(self, past: Past, cache: Cache, attend: Attend):
        self.past, self.cache, self.attend = past, dict(cache), attend

    def open(self, loop: Array | None, layer: int | None) -> Page:
        """The history of a place: of a loop and layer, of one of them, or of the model."""
        return Page(self, loop, layer)


class Page:
    """The history of one place while decoding: writes to the cache, and reads from it.

    Without a name it is a layer's own attention; a part or rule is `at` a place of its own.
    """

    writes = True

    def __init__(self, pages: Pages, loop: Array | None, layer: int | None, place: str = ""):
        self._pages, self._loop, self._layer, self._place = pages, loop, layer, place
        slots = pages.past.slots
        self._written: set[str] = set()
        self._remembers = jnp.asarray(True) if loop is None else slots.remembers(loop)

    def at(self, place: str) -> Page:
        return Page(self._pages, self._loop, self._layer, place)

    def attend(self, query: Array, key: Array, value: Array, window: int | None) -> Array:
        past, cache = self._pages.past, self._pages.cache
        if self._place:
            slot, names = self._slot(), (self._name("key"), self._name("value"))
        else:
            assert self._loop is not None and self._layer is not None
            slot, names = past.slots.index(self._loop, self._layer), ("key", "value")
        for name, new in zip(names, (key, value), strict=True):
            self._write(name, new, slot)
        if past.first:
            return self._pages.attend(query, key, value, window)
        key, value = (cache[name][slot] for name in names)
        return _look_back(key, value, query, past.positions, self._remembers, window)

    def previous(self, name: str, x: Array, offset: int) -> Array:
        past, name, slot = self._pages.past, self._name(name), self._slot()
        if name not in self._written:  # several offsets look at one stream: see Finder
            self._write(name, x, slot)
            self._written.add(name)
        if past.first:
            return shifted(x, offset)
        rows = jnp.arange(len(x))[:, None]
        source = past.positions - offset
        found = self._pages.cache[name][slot, rows, jnp.maximum(source, 0)]
        known = (source >= 0) & (self._remembers | (source >= past.positions[:, :1]))
        return jnp.where(known.reshape(*known.shape, *[1] * (x.ndim - 2)), found, 0)

    def _name(self, name: str) -> str:
        return f"{scope_of(self._loop, self._layer)}/{self._place}/{name}"

    def _slot(self) -> Array:
        return self._pages.past.slots.place(self._loop, self._layer)

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

    `streams` are what parts look back at, as transformer.history_shapes finds them: [1, 1, …] each.
    """
    slots = Slots.of(config, loops, kind)
    shape = (slots.count, batch, length, config.kv_heads, config.head_dim)
    cache = {name: jnp.zeros(shape, config.dtype) for name in ("key", "value")}
    for name, stream in streams.items():
        places = slots.places(name.split("/")[0])
        cache[name] = jnp.zeros((places, batch, length, *stream.shape[2:]), stream.dtype)
    return cache


def spec(name: str) -> P:
    """How a mesh cuts a stream of the cache: rows over the batch axes, heads over `tensor`."""
    rows = P(None, ("data", "fsdp"))
    return P(*rows, None, "tensor") if name in ("key", "value") else rows


class Finder:
    """The history of one place that finds out what a model looks back at, in one abstract pass."""

    writes = True

    def __init__(
        self, found: dict[str, Array], scope: str, place: str = "", here: dict | None = None
    ):
        self._found, self._scope, self._place = found, scope, place
        self._here: dict[str, Array] = {} if here is None else here

    def at(self, place: str) -> Finder:
        return Finder(self._found, self._scope, place, self._here)

    def attend(self, query: Array, key: Array, value: Array, window: int | None) -> Array:
        if self._place:
            self.previous("key", key, 0)
            self.previous("value", value, 0)
        return query

    def previous(self, name: str, x: Array, offset: int) -> Array:
        """Raises ValueError where one name stands for two streams of one place."""
        key = f"{self._scope}/{self._place}/{name}"
        if self._here.setdefault(key, x) is not x:
            raise ValueError(f"{self._place} looks back at two streams as {name!r}; name both")
        self._found[key] = x
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
