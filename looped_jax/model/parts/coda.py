"""Layers that run once after the loops, so that a state need not be what the head reads.

h ← norm of the stream after C layers that begin with the state, for each loop count that is read:
scoring several counts runs them as often. The layers are as those of the prelude. Source: Geiping
et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025 (arXiv 2502.05171).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from looped_jax.config.options import at_least
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.base import Here, Part, PartSettings
from looped_jax.model.parts.prelude import Unlooped

Array = jax.Array


@dataclass(frozen=True)
class CodaSettings(PartSettings):
    """Of the layers after the loops."""

    layers: int = at_least(1, 2, "C, how many")


@PARTS.register("coda")
class Coda(Part):
    """Site: exit."""

    Settings = CodaSettings
    each_layer = False

    def __init__(
        self, settings: CodaSettings, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs
    ):
        self.layers = Unlooped(config, settings.layers, "coda", rngs=rngs)

    def exit(self, h: Array, here: Here) -> Array:
        return rms_norm(self.layers(h, here))
