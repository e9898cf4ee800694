"""A gate that learns after which loop a token may leave: with the model, or after it.

λ_t is the gate's probability of leaving after loop t, of a part at the site `stop` such as
`exit_gate`; p_t = λ_t · Π_{s<t} (1 − λ_s), and the last loop takes what is left.

EXIT trains model and gate: Σ p_t CE_t − entropy · H(p), of each token. Without the entropy p
collapses onto one loop.

EXIT_GATE trains the gate alone, by whether a loop still helped: with I_t = max(0, CE_{t−1} − CE_t),
the gate is told to go on after loop t by σ(steepness · (I_t − threshold)), binary cross-entropy,
mean over t ≥ 2. No gradient reaches the model, so that with optim.weight_decay=0 it stays as it is.

Source: Zhu et al., "Scaling Latent Reasoning via Looped Language Models", 2025 (arXiv 2510.25741),
its two stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from looped_jax.config.options import at_least
from looped_jax.config.registry import OBJECTIVES, PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ConfigError
from looped_jax.model import loss, transformer
from looped_jax.model.objectives.base import Batch, Params, counted
from looped_jax.model.objectives.scored_loops import Step

Array = jax.Array


def log_leaving(stop: Array) -> Array:
    """Log-probability float32 [N, …] of leaving after each loop, of its gate's logits [N, …]."""
    stays = jnp.cumsum(jax.nn.log_sigmoid(-stop[:-1]), axis=0)
    stayed = jnp.concatenate([jnp.zeros_like(stop[:1]), stays])
    leaves = jnp.concatenate([jax.nn.log_sigmoid(stop[:-1]), jnp.zeros_like(stop[:1])])
    return stayed + leaves


class Gated(Step):
    """Every loop, and what a gate says of it. Raises ConfigError without a gate, or two loops."""

    weighs_beforehand = False

    def loops(self, config: ModelConfig) -> tuple[int, ...]:
        if not any(hasattr(PARTS[name], "stop") for name in config.parts.on()):
            raise ConfigError(
                f"model.loss={config.loss} trains a gate, and the model has none; add "
                "model.parts.exit_gate.on=True"
            )
        if config.loops < 2:
            raise ConfigError(
                f"model.loops={config.loops} leaves the gate of model.loss={config.loss} no "
                "choice; raise it, or choose model.loss=END"
            )
        return super().loops(config)


@dataclass(frozen=True)
class ExitSettings:
    """Of a gate that is trained with the model."""

    entropy: float = at_least(0.0, 0.1, "β, what a token's entropy over loops is worth in nats")


@OBJECTIVES.register("EXIT")
class Exit(Gated):
    """Every loop, as likely as the gate leaves there."""

    Settings = ExitSettings

    def loss(
        self, config: ModelConfig, params: Params, hidden: Array, batch: Batch
    ) -> tuple[Array, Array]:
        nats = loss.token_losses(config, params, hidden, batch["targets"])
        log_p = log_leaving(transformer.stop_logits(config, params, hidden))
        worth = config.objectives["EXIT"].entropy
        expected = (jnp.exp(log_p) * (nats + worth * log_p)).sum(0)
        return jnp.where(counted(batch), expected, 0.0).sum(), nats.sum((1, 2))


@dataclass(frozen=True)
class ExitGateSettings:
    """Of a gate that is trained after the model."""

    steepness: float = at_least(0.0, 50.0, "of what the gate is told, per nat")
    threshold: float = at_least(0.0, 0.005, "nats that a loop has to gain for the gate to go on")


@OBJECTIVES.register("EXIT_GATE")
class ExitGate(Gated):
    """The gate alone, told by what each loop gained."""

    Settings = ExitGateSettings

    def loss(
        self, config: ModelConfig, params: Params, hidden: Array, batch: Batch
    ) -> tuple[Array, Array]:
        settings, hidden = config.objectives["EXIT_GATE"], jax.lax.stop_gradient(hidden)
        nats = loss.token_losses(config, params, hidden, batch["targets"])
        nats = jax.lax.stop_gradient(nats)
        gained = jnp.maximum(nats[:-1] - nats[1:], 0.0)
        go_on = jax.nn.sigmoid(settings.steepness * (gained - settings.threshold))
        stop = transformer.stop_logits(config, params, hidden)[1:]
        told = -go_on * jax.nn.log_sigmoid(-stop) - (1 - go_on) * jax.nn.log_sigmoid(stop)
        return jnp.where(counted(batch), told.mean(0), 0.0).sum(), nats.sum((1, 2))
