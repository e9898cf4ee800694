"""Dropout in training: of the embedding, of what branches add, and of attention weights.

x ← x · m / (1 − rate), with m 1 or 0, and 0 as often as `rate` says. m is of the row, token, loop,
layer and channel, or of the key for attention weights; the embedding's is drawn once, before the
loops. Evaluation and decoding have none, nor have layers of prelude and coda.

Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
2014; in these places as in GPT-2 (Radford et al., 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import at_least
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.parts.base import Here, Part, PartSettings

Array = jax.Array
MOST = 0.99  # something has to be left


@dataclass(frozen=True)
class DropoutSettings(PartSettings):
    """How much is dropped where."""

    embedding: float = at_least(0.0, 0.1, "of the embedding, and of positions in it", high=MOST)
    branch: float = at_least(0.0, 0.1, "of what attention and MLP add to the stream", high=MOST)


@dataclass(frozen=True)
class AttentionDropoutSettings(PartSettings):
    """How much is dropped of attention weights."""

    rate: float = at_least(0.0, 0.1, "of the weights of each query and head", high=MOST)


@PARTS.register("attention_dropout")
class AttentionDropout(Part):
    """Site: attention_weights, so that plain attention takes over from a fused kernel."""

    Settings = AttentionDropoutSettings
    draws = True

    def __init__(
        self,
        settings: AttentionDropoutSettings,
        config: ModelConfig,
        layer: int | None,
        *,
        rngs: nnx.Rngs,
    ):
        self._rate = settings.rate

    def attention_weights(self, weights: Array, here: Here) -> Array:
        heads, keys = weights.shape[1], weights.shape[3]
        kept = _kept(self._rate, (heads, keys), here)  # of each query [B, T, H, keys]
        return weights * kept.swapaxes(1, 2)


@PARTS.register("dropout")
class Dropout(Part):
    """Sites: entry, attention_output, mlp_output."""

    Settings = DropoutSettings
    draws = True

    def __init__(self, settings: Any, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs):
        self._settings = settings

    def entry(self, e: Array, here: Here) -> Array:
        # Of a layer, so that it comes after all parts of the model: positions are dropped too.
        return _dropped(e, self._settings.embedding if here.layer == 0 else 0.0, here)

    def attention_output(self, x: Array, here: Here) -> Array:
        return _dropped(x, self._settings.branch, here)

    def mlp_output(self, x: Array, here: Here) -> Array:
        return _dropped(x, self._settings.branch, here)


def _dropped(x: Array, rate: float, here: Here) -> Array:
    if not rate or not here.training:
        return x
    return x * _kept(rate, x.shape[2:], here).astype(x.dtype)


def _kept(rate: float, shape: tuple[int, ...], here: Here) -> Array:
    """What to multiply with, float32 [B, T, *shape]: 0, or 1 / (1 − rate)."""
    kept = here.draw(jax.random.bernoulli, 1 - rate, shape)
    return jnp.where(kept, 1 / (1 - rate), 0.0)
