"""A vector for every loop, added to the stream at its start: a loop knows which it is.

learned     x ← x + v[loop], with v [K, D] zero at the start; beyond the trained K the last loop's
sinusoidal  x ← x + s(loop), counted from 1, for as many loops as are run; never the plain model

With `positions` x has s(position) added too, in every loop. s(n) [D] holds sin(n · r_j) in its
first half and cos(n · r_j) in its second, r_j = 10000 ** (−2 j / D).

Source: the coordinate embedding of Dehghani et al., "Universal Transformers", 2018 (arXiv
1807.03819), equation 6, which is both sinusoids; learned it is an embedding of that time step.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import one_of, setting
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.parts.base import Here, Part, PartSettings, of_loop
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class LoopEmbeddingSettings(PartSettings):
    """Of what is added at the start of a loop."""

    kind: str = one_of(("learned", "sinusoidal"), "learned", "of loops")
    positions: bool = setting(False, "sinusoids of the position as well")


def sinusoids(n: Array, width: int) -> Array:
    """s(n), float32 [..., width], of numbers [...]; an odd width loses its last cosine."""
    rate = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = n[..., None].astype(jnp.float32) * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[..., :width]


@PARTS.register("loop_embedding")
class LoopEmbedding(Part):
    """Sites: entry (looks up positions), loop_start."""

    Settings = LoopEmbeddingSettings
    each_layer = False

    def __init__(
        self,
        settings: LoopEmbeddingSettings,
        config: ModelConfig,
        layer: int | None,
        *,
        rngs: nnx.Rngs,
    ):
        self._positions = settings.positions
        learned = settings.kind == "learned"
        vectors = jnp.zeros((config.loops, config.width))
        self.vectors = weight(vectors, None, "embed", group="vector") if learned else None

    def entry(self, e: Array, here: Here) -> Array:
        if self._positions:
            here.entry["loop_embedding"] = sinusoids(here.positions, e.shape[-1]).astype(e.dtype)
        return e

    def loop_start(self, x: Array, here: Here) -> Array:
        if self._positions:
            x = x + here.entry["loop_embedding"]
        v = self.vectors
        added = sinusoids(here.loop + 1, x.shape[-1]) if v is None else of_loop(v, here)
        return x + added.astype(x.dtype)
