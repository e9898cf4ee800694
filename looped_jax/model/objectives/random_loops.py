"""The last loop's loss, and those of k others that every row draws anew in each step.

(CE_K + Σ CE_t over k loops before it, drawn without replacement) / (k + 1), for each row. The head
reads k + 1 states of a token and not K.

A loop's logged loss is that of the rows that drew it, times (K − 1) / k, over the tokens of all
rows: k / (K − 1) is how likely a row draws it, so that its expectation is the loss of all rows
(Horvitz and Thompson, 1952). It is noisier than that where k is small; the last loop's is exact.

Source: deep supervision, Lee et al., "Deeply-Supervised Nets", 2014 (arXiv 1409.5185), here of
loops and at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from looped_jax.config.options import at_least
from looped_jax.config.registry import OBJECTIVES
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ConfigError
from looped_jax.model import loss, random_numbers
from looped_jax.model.objectives.base import Batch, Params
from looped_jax.model.objectives.scored_loops import Step

Array = jax.Array


@dataclass(frozen=True)
class RandomLoopsSettings:
    """Of the loops beside the last."""

    others: int = at_least(1, 1, "k, how many loops before the last a row draws")


@OBJECTIVES.register("RANDOM")
class RandomLoops(Step):
    """The last loop and some that each row draws. Raises ConfigError where k leaves no choice."""

    weighs_beforehand = False

    Settings = RandomLoopsSettings
    draws = True

    def loops(self, config: ModelConfig) -> tuple[int, ...]:
        others = config.objectives["RANDOM"].others
        if others >= config.loops:
            raise ConfigError(
                f"model.objectives.RANDOM.others={others}: model.loops={config.loops} has "
                f"{config.loops - 1} before the last; give fewer others or more loops, or choose "
                "model.loss=END"
            )
        return super().loops(config)

    def read_outs(self, config: ModelConfig) -> int:
        return config.objectives["RANDOM"].others + 1

    def loss(
        self, config: ModelConfig, params: Params, hidden: Array, batch: Batch
    ) -> tuple[Array, Array]:
        others, last = config.objectives["RANDOM"].others, config.loops - 1
        drawn = drawn_loops(batch["seeds"], last, others)
        read = jnp.concatenate([drawn, jnp.full((1, drawn.shape[1]), last)])  # [k + 1, B]
        rows, targets = jnp.arange(drawn.shape[1]), batch["targets"]
        targets = targets if targets.ndim == 2 else targets[read, rows]
        nats = loss.token_losses(config, params, hidden[read, rows], targets).sum(2)
        of_loops = jnp.zeros(config.loops, nats.dtype).at[read].add(nats)
        share = jnp.where(jnp.arange(config.loops) == last, 1.0, others / max(last, 1))
        return nats.sum() / (others + 1), of_loops / share


def drawn_loops(seeds: Array, last: int, others: int) -> Array:
    """`others` of the loops 0 to `last` − 1 for each row, int32 [k, B], no loop twice."""
    keys = random_numbers.keys_of_rows(seeds, "RANDOM")
    order = jax.vmap(lambda key: jax.random.permutation(key, last))(keys)
    return order[:, :others].T
