"""A loop that goes only a part of its way: the state keeps a share of what it was.

h ← norm((1 − kept) · norm(x) + kept · h), with x the stream at the end of the loop and h the state
before it; the first loop has no state to keep. kept = 0 is the plain model; 1 − 1 / K, with K the
trained number, is the form that needs no training. Source: the damped iteration of numerical
analysis (Krasnoselskii, 1955), here on normalised states.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from looped_jax.config.options import share
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.base import Here, Part, PartSettings

Array = jax.Array


@dataclass(frozen=True)
class DampingSettings(PartSettings):
    """Of the state between loops."""

    kept: float = share(0.5, "of the state that a loop begins with")


@PARTS.register("damping")
class Damping(Part):
    """Site: loop_end."""

    Settings = DampingSettings
    each_layer = False
    starts_as_identity = False

    def __init__(
        self, settings: DampingSettings, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs
    ):
        self._kept = settings.kept

    def loop_end(self, x: Array, here: Here) -> Array:
        return (1 - self._kept) * rms_norm(x) + self._kept * here.h  # h is 0 in the first loop
