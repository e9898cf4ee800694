"""A norm behind each branch as well as before it, so that the stream cannot grow without bound.

After "branch": x ← x + norm(f(norm(x))). After "sum": x ← norm(x + f(norm(x))). Every norm has a
learned gain per channel that starts at `gain`. It is never the plain model. As a fresh branch is 0,
where the slope of a norm is steepest, the first gradients are clipped hard. The layers of prelude
and coda have the same norms.

Source: after the branch, Zhu et al., "Scaling Latent Reasoning via Looped Language Models", 2025
(arXiv 2510.25741); after the sum, Geiping et al., "Scaling up Test-Time Compute with Latent
Reasoning", 2025 (arXiv 2502.05171).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import at_least, one_of
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.base import Here, Part, PartSettings
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class SandwichNormSettings(PartSettings):
    """Of the second norm of each branch."""

    after: str = one_of(("branch", "sum"), "branch", "what is normalised: a branch, or x with it")
    gain: float = at_least(0.0, 1.0, "at the start, of every channel")


@PARTS.register("sandwich_norm")
class SandwichNorm(Part):
    """Sites: attention_output, mlp_output; or attention_sum, block_output."""

    Settings = SandwichNormSettings
    starts_as_identity = False
    in_unlooped = True

    def __init__(
        self,
        settings: SandwichNormSettings,
        config: ModelConfig,
        layer: int | None,
        *,
        rngs: nnx.Rngs,
    ):
        self._after = settings.after
        gain = jnp.full((config.width,), settings.gain)
        self.of_attention = weight(gain, "embed", group="vector")
        self.of_mlp = weight(gain, "embed", group="vector")

    def attention_output(self, x: Array, here: Here) -> Array:
        return self._norm("branch", x, self.of_attention)

    def mlp_output(self, x: Array, here: Here) -> Array:
        return self._norm("branch", x, self.of_mlp)

    def attention_sum(self, x: Array, here: Here) -> Array:
        return self._norm("sum", x, self.of_attention)

    def block_output(self, x: Array, here: Here) -> Array:
        return self._norm("sum", x, self.of_mlp)

    def _norm(self, place: str, x: Array, gain: nnx.Param) -> Array:
        return rms_norm(x) * gain[...].astype(x.dtype) if place == self._after else x
