"""Random numbers inside of the model: each of one row, token, loop, layer and place.

In training every row of a batch has a seed, which the host draws (training/row_draws.py). A number
follows from that seed, the token's position, loop, layer and the place that asks, and from nothing
else. So it does not depend on the rows beside it, on meshes or micro-batches, or on how a row is
cut into decoding steps, and it is the same when a backward pass computes a loop again. Without
seeds, as in evaluation, scoring and decoding, all rows have the one seed 0.

A part, rule or objective that asks says so in its class, `draws = True`. Where none does, batches
hold no seeds and programs nothing of this.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from looped_jax.config.registry import LOOP_RULES, OBJECTIVES, PARTS
from looped_jax.config.resolved import ModelConfig

Array = jax.Array
# With others, such as rbg, what a row draws would depend on how many are drawn beside it.
GENERATOR = "threefry2x32"


def in_model(config: ModelConfig) -> bool:
    """Whether the model's own programs draw: a part that is on, or the loop rule."""
    kinds = [PARTS[name] for name in config.parts.on()] + [LOOP_RULES[config.variant]]
    return any(kind.draws for kind in kinds)


def in_training(config: ModelConfig) -> bool:
    """Whether rows of training need seeds: the model draws, or the objective."""
    return in_model(config) or OBJECTIVES[config.loss].draws


def keys_of_rows(seeds: Array, place: str) -> Array:
    """A key for each row [B] of uint32 seeds [B], at a place that knows no tokens."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(_keys(seeds), _number(place))


@dataclass(frozen=True, eq=False)
class RandomNumbers:
    """What the tokens of a pass draw from.

    keys: [B, T], or [1, T] where all rows draw the same
    training: whether rows have seeds of their own
    """

    keys: Array
    training: bool

    @classmethod
    def of(cls, seeds: Array | None, positions: Array) -> RandomNumbers:
        """For tokens at positions [T] or [B, T], of rows with uint32 seeds [B] or without."""
        rows = _keys(jnp.zeros((1,), jnp.uint32) if seeds is None else seeds)
        return cls(_fold(rows[:, None], jnp.atleast_2d(positions)), seeds is not None)

    def draw(
        self,
        sampler: Callable[..., Array],
        *arguments: Any,
        place: str,
        loop: Array | None,
        layer: int | None,
    ) -> Array:
        """sampler(key, *arguments) of each token, stacked to [B or 1, T, …]; see Here.draw."""
        keys = _fold(self.keys, jnp.uint32(_number(f"{place} {layer}")))
        keys = keys if loop is None else _fold(keys, loop)
        return jax.vmap(jax.vmap(lambda key: sampler(key, *arguments)))(keys)


def _keys(seeds: Array) -> Array:
    return jax.vmap(lambda seed: jax.random.key(seed, impl=GENERATOR))(seeds)


def _number(place: str) -> int:
    return zlib.crc32(place.encode())


def _fold(keys: Array, numbers: Array) -> Array:
    """Keys [B, T] told apart by numbers that broadcast with them."""
    shape = jnp.broadcast_shapes(keys.shape, numbers.shape)
    keys, numbers = jnp.broadcast_to(keys, shape), jnp.broadcast_to(numbers, shape)
    return jax.vmap(jax.vmap(jax.random.fold_in))(keys, numbers)
