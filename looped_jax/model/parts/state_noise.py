"""Noise on the state between loops, in training alone.

h ← norm(norm(x) + std · n) after each loop, with x the stream at its end and n normal, of the row,
token and loop. So a loop learns to come back from states beside those that it knows. Evaluation and
decoding have none. Source: EqR, which adds noise of 0.01 to the state of every loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from looped_jax.config.options import at_least
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.norm import rms
from looped_jax.model.parts.base import Here, Part, PartSettings

Array = jax.Array


@dataclass(frozen=True)
class StateNoiseSettings(PartSettings):
    """Of the noise between loops."""

    std: float = at_least(
        0.0, 0.01, "of the noise, where a state's channels have a mean square of 1"
    )


@PARTS.register("state_noise")
class StateNoise(Part):
    """Site: loop_end."""

    Settings = StateNoiseSettings
    each_layer = False
    draws = True

    def __init__(
        self,
        settings: StateNoiseSettings,
        config: ModelConfig,
        layer: int | None,
        *,
        rngs: nnx.Rngs,
    ):
        self._std = settings.std

    def loop_end(self, x: Array, here: Here) -> Array:
        if not here.training:
            return x
        # In units of the stream, which the closing norm divides by: logged norms stay the stream's.
        noise = self._std * here.draw(jax.random.normal, x.shape[-1:])
        return x + (rms(x) * noise).astype(x.dtype)
