"""Losses that count more where they are high: each row's, after every loop, times itself.

Mean over loops and rows of sg(ℓ) / 10 · ℓ, with ℓ the mean loss of a row after a loop and sg(ℓ) the
same without gradient. Source: `base_rl.py` of the code of arXiv 2605.18797, which calls it
reinforcement learning; its form for every loop.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from looped_jax.config.registry import OBJECTIVES
from looped_jax.config.resolved import ModelConfig
from looped_jax.model import loss
from looped_jax.model.objectives.base import Batch, Params, counted
from looped_jax.model.objectives.scored_loops import Step

Array = jax.Array


@OBJECTIVES.register("SELF_WEIGHTED")
class SelfWeighted(Step):
    """Every loop, rows by their own loss."""

    weighs_beforehand = False

    def loss(
        self, config: ModelConfig, params: Params, hidden: Array, batch: Batch
    ) -> tuple[Array, Array]:
        rows = loss.token_losses(config, params, hidden, batch["targets"]).sum(2)  # [N, B]
        mean = jax.lax.stop_gradient(rows / jnp.maximum(counted(batch).sum(1), 1))
        return (mean / 10 * rows).sum(1).mean(), rows.sum(1)
