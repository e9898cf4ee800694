"""Streams beside the state that loops read from and write to: what a loop leaves need not be lost.

H ← M H + b ⊗ norm(x), and h = norm(a · H): n streams H [n, D] of every token take up x, the stream
at the end of a loop, by a [n], b [n] and M [n, n], those of all loops or of each. All streams begin
as norm(e). At the start M = diag(i / n) and b = 1 − i / n, for i from 0, and a reads the first
alone, which is norm(x): the plain model, beside running means of its states.

Source: Zhu et al., "Hyper-Connections", 2024 (arXiv 2409.19606), in its static form; at the end of
loops as in Zeitoun et al., "Hyperloop Transformers", 2026 (arXiv 2604.21254).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import at_least, setting
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.base import Here, Part, PartSettings, of_loop
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class HyperConnectionsSettings(PartSettings):
    """Of the streams between loops."""

    streams: int = at_least(2, 4, "n, how many")
    each_loop: bool = setting(False, "whether every loop has a, b and M of its own")


@PARTS.register("hyper_connections")
class HyperConnections(Part):
    """Sites: entry, loop_end."""

    Settings = HyperConnectionsSettings
    each_layer = False

    def __init__(
        self,
        settings: HyperConnectionsSettings,
        config: ModelConfig,
        layer: int | None,
        *,
        rngs: nnx.Rngs,
    ):
        self._streams = settings.streams
        kept = jnp.arange(settings.streams) / settings.streams
        sets = (config.loops if settings.each_loop else 1, 1)
        self.read = weight(jnp.tile(kept == 0, sets) * 1.0, None, None, group="vector")
        self.write = weight(jnp.tile(1 - kept, sets), None, None, group="vector")
        self.mix = weight(jnp.tile(jnp.diag(kept), (*sets, 1)), None, None, None, group="vector")

    def entry(self, e: Array, here: Here) -> Array:
        here.carried["hyper_connections"] = jnp.stack([e] * self._streams, axis=2)
        return e

    def loop_end(self, x: Array, here: Here) -> Array:
        read, write, mix = (
            of_loop(w, here).astype(x.dtype) for w in (self.read, self.write, self.mix)
        )
        before = here.carried["hyper_connections"]  # [B, T, n, D]
        e = here.x0[..., None, :]
        begins = (here.loop == 0)[..., None, None]  # also where a part gives the first state
        before = jnp.where(begins, e, before)
        streams = mix @ before + write[..., None] * rms_norm(x)[..., None, :]
        here.carried["hyper_connections"] = streams
        return (read[..., None, :] @ streams)[..., 0, :]
