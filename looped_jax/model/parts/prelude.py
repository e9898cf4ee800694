"""Layers that run once before the loops, so that what is looped need not begin at the embedding.

e ← the stream after P layers that begin with the embedding; rules and loops then read this e. The
layers are blocks as the looped ones, with full context, and of the parts of layers they have those
that say so, such as sandwich norms. The stream starts as the embedding, for fresh blocks add
nothing. Source: Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025 (arXiv
2502.05171), whose sizes are 2 layers, 4 looped, 2.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
from flax import nnx

from looped_jax.config.options import Parts, at_least
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model import block
from looped_jax.model.loop_scan import rematerialised
from looped_jax.model.parts.base import Here, Part, PartSettings

Array = jax.Array


@dataclass(frozen=True)
class PreludeSettings(PartSettings):
    """Of the layers before the loops."""

    layers: int = at_least(1, 2, "P, how many")


class Unlooped(nnx.Module):
    """Some layers that run once, at a place of the model."""

    def __init__(self, config: ModelConfig, layers: int, place: str, *, rngs: nnx.Rngs):
        parts = {n: config.parts[n] for n in config.parts.on() if PARTS[n].in_unlooped}
        config = dataclasses.replace(config, layers=layers, window_pattern="L", parts=Parts(parts))
        key = rngs.parts()
        rngs = nnx.Rngs(params=key, parts=jax.random.fold_in(key, 1))
        self.blocks = nnx.List([block.Block(config, n, rngs=rngs) for n in range(layers)])
        self._place, self._remat = place, config.remat

    def __call__(self, x: Array, here: Here) -> Array:
        for layer, one in enumerate(self.blocks):
            with jax.named_scope(f"{self._place}_{layer}"):
                history = here.history.at(f"{self._place}.{layer}")
                remat = "none" if history.writes else self._remat
                run = functools.partial(_run, one, here._replace(history=history))
                x = rematerialised(run, remat, scanned=False)(x)
        return x


def _run(layer: block.Block, here: Here, x: Array) -> Array:
    return layer(x, x, here)


@PARTS.register("prelude")
class Prelude(Part):
    """Site: entry."""

    Settings = PreludeSettings
    each_layer = False

    def __init__(
        self, settings: PreludeSettings, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs
    ):
        self.layers = Unlooped(config, settings.layers, "prelude", rngs=rngs)

    def entry(self, e: Array, here: Here) -> Array:
        return self.layers(e, here)
