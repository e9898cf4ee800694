"""A state to start the first loop from, so that it is a loop as every other.

h_0 = scale · n, or scale · norm(e), and the loop rule reads it as it reads any later state. `kind`:

normal     n of unit variance, in every channel of every token
like_init  the same cut at three standard deviations; embeddings here are born with one of 1
embedding  norm(e), and no random numbers
zero       nothing: the first loop is told that there is a state, and it is zero

In training n follows from the row's seed and the token's position, in evaluation and decoding from
the position alone: all rows then start alike, whatever is asked of them and in which order. A rule
that reads no embedding after the first loop, as LT, never sees the tokens unless h_0 holds them.

Source: Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025 (arXiv
2502.05171), and Parcae after it, whose `like-init` has a standard deviation of √0.4: embeddings of
variance 2 / (5 D), times √D. EqR starts from N(0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from looped_jax.config.options import at_least, one_of
from looped_jax.config.registry import LOOP_RULES, PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ConfigError
from looped_jax.model.parts.base import Here, Part, PartSettings

Array = jax.Array
KEY = "model.parts.state_init"
KINDS = ("normal", "like_init", "embedding", "zero")
CUT = 3.0  # standard deviations, of like_init


@dataclass(frozen=True)
class StateInitSettings(PartSettings):
    """Of the state before the first loop."""

    kind: str = one_of(KINDS, "normal", "what it is drawn from, or is")
    scale: float = at_least(0.0, 1.0, "that it is multiplied with")


@PARTS.register("state_init")
class StateInit(Part):
    """Site: initial_state. Raises ConfigError for a state without what the rule will need of it."""

    Settings = StateInitSettings
    each_layer = False
    starts_as_identity = False
    draws = True

    def __init__(
        self, settings: StateInitSettings, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs
    ):
        if settings.kind == "zero" and settings.scale != 1:
            raise ConfigError(
                f"{KEY}.scale={settings.scale} of {KEY}.kind=zero changes nothing; leave it out"
            )
        if settings.scale == 0:
            raise ConfigError(f"{KEY}.scale=0 leaves nothing; give {KEY}.kind=zero instead")
        if settings.kind != "embedding" and not LOOP_RULES[config.variant].rereads_embedding:
            raise ConfigError(
                f"{KEY}.kind={settings.kind} with model.variant={config.variant}, which reads the "
                "embedding in the first loop alone: no loop would see the tokens; give "
                f"{KEY}.kind=embedding, or a rule that reads them again, as LT_i"
            )
        self._kind, self._scale = settings.kind, settings.scale

    def initial_state(self, h: Array, here: Here) -> Array:
        if self._kind == "embedding":
            return self._scale * here.x0
        if self._kind == "normal":
            h = h + self._scale * here.draw(jax.random.normal, h.shape[-1:]).astype(h.dtype)
        if self._kind == "like_init":
            drawn = here.draw(jax.random.truncated_normal, -CUT, CUT, h.shape[-1:])
            h = h + self._scale * drawn.astype(h.dtype)
        return h
