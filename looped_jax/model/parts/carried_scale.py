"""Loops that go on at the size of the stream that the loop before has left.

x ← s · x at the start of a loop, with s [B, T, 1] the root mean square of the stream at the end of
the loop before, 1 in the first. States are normed, and so is what a loop starts from. Under LT,
which goes on from h = norm(x), s · h is x itself: K loops are one transformer of K · L layers with
one norm at its end. Under rules that start from the embedding, the embedding grows instead.

Source: a plain stack of layers, as in nanochat (Karpathy, 2025), gone through K times.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.norm import rms
from looped_jax.model.parts.base import Here, Part, refuse_other_norms

Array = jax.Array


@PARTS.register("carried_scale")
class CarriedScale(Part):
    """Sites: entry, loop_start, loop_end."""

    each_layer = False
    starts_as_identity = False

    def __init__(self, settings: Any, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs):
        refuse_other_norms("carried_scale", config)

    def entry(self, e: Array, here: Here) -> Array:
        here.carried["carried_scale"] = rms(e)
        return e

    def loop_start(self, x: Array, here: Here) -> Array:
        begins = (here.loop == 0)[..., None]
        scale = jnp.where(begins, 1.0, here.carried["carried_scale"])
        return (x * scale).astype(x.dtype)

    def loop_end(self, x: Array, here: Here) -> Array:
        here.carried["carried_scale"] = rms(x)
        return x
