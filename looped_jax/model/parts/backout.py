"""What was in the stream half-way is taken out of it again before the head reads it.

h ← norm(x − λ · m), with x the stream at the end of the loop whose state is read and m the stream
after visit K · L // 2 of the K · L visits of layers, counted from 0; with `middle` = of_last_loop
after layer L // 2 of that loop. Loops go on from x itself. K is the trained number: a run of so few
loops that m has not come is read as it is.

The stream is known as rms(x) · h; where a part changes the state of a loop, that is what is read.

Source: nanochat (Karpathy, 2026) after modded-nanogpt; there after layer L // 2, with one loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import one_of, setting
from looped_jax.config.registry import PARTS, WEIGHT_GROUPS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.norm import rms, rms_norm
from looped_jax.model.parts.base import Here, Part, PartSettings, refuse_other_norms
from looped_jax.model.weight_groups import WeightGroup
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class BackoutSettings(PartSettings):
    """Of the stream that is taken out."""

    start: float = setting(0.2, "λ at the start")
    middle: str = one_of(("of_all_visits", "of_last_loop"), "of_all_visits", "where it was")


@WEIGHT_GROUPS.register("backout")
class BackoutGroup(WeightGroup):
    """Strength of the backout."""

    logged = True


@PARTS.register("backout")
class Backout(Part):
    """Sites: entry, layer_end, loop_end, exit."""

    Settings = BackoutSettings
    each_layer = False
    starts_as_identity = False

    def __init__(
        self, settings: BackoutSettings, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs
    ):
        refuse_other_norms("backout", config)
        self.scale = weight(jnp.full((1,), settings.start), None, group="backout")
        self._each_loop = settings.middle == "of_last_loop"
        visits = config.layers * (1 if self._each_loop else config.loops)
        self._loop, self._layer = divmod(visits // 2, config.layers)

    def entry(self, e: Array, here: Here) -> Array:
        here.carried["backout.middle"], here.carried["backout.size"] = e, rms(e)
        return e

    def layer_end(self, x: Array, here: Here) -> Array:
        if here.layer == self._layer:
            now = self._each_loop | (here.loop == self._loop)[..., None]
            here.carried["backout.middle"] = jnp.where(now, x, here.carried["backout.middle"])
        return x

    def loop_end(self, x: Array, here: Here) -> Array:
        here.carried["backout.size"] = rms(x)
        return x

    def exit(self, h: Array, here: Here) -> Array:
        size, middle = here.carried["backout.size"], here.carried["backout.middle"]
        return rms_norm(size * h - self.scale[...] * middle).astype(h.dtype)
