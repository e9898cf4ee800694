"""What training minimises: which loops are read, and what is asked of each.

A batch is a dict: inputs [B, T]; targets [B, T] shared by all loops that are read, or [N, B, T] of
its own for each of them; negative targets are left out. An objective never takes part in
validation, which scores the same targets at every loop count.

An objective of your own is registered like those below, and is then a choice of `model.loss`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from looped_jax.config.registry import OBJECTIVES
from looped_jax.config.resolved import ModelConfig
from looped_jax.model import loss

Array = jax.Array
Batch = dict[str, Array]
Params = dict[str, Array]


class Objective:
    """Mean of the token losses after some loops. Source: arXiv 2605.18797, its three loss types.

    Reads zero-based loops; a subclass chooses them, and may weigh their losses otherwise.
    """

    def loops(self, config: ModelConfig) -> tuple[int, ...]:
        """Zero-based loops whose states are read, the last one included."""
        return (config.loops - 1,)

    def nats(self, config: ModelConfig, params: Params, hidden: Array, batch: Batch) -> Array:
        """Summed losses float32 [N] of states [N, B, T, D] after the loops that are read."""
        return loss.token_losses(config, params, hidden, batch["targets"]).sum((1, 2))

    def total(self, config: ModelConfig, nats: Array) -> Array:
        """What is differentiated: one number, linear in the summed losses [N]."""
        return nats.mean()


@OBJECTIVES.register("END")
class End(Objective):
    """The last loop alone."""


@OBJECTIVES.register("FEW")
class Few(Objective):
    """The last third of the loops."""

    def loops(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(range(2 * config.loops // 3, config.loops))


@OBJECTIVES.register("STEP")
class Step(Objective):
    """Every loop."""

    def loops(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(range(config.loops))


def of(config: ModelConfig) -> Objective:
    """The objective that the config names."""
    return OBJECTIVES[config.loss]()


def batch_of(rows: Array | Batch) -> Batch:
    """The batch of rows [B, T + 1] of text, where every token is the target of the one before.

    One that is a batch already has its targets of each loop, [B, N, T] as rows are cut, moved to
    [N, B, T].
    """
    if not isinstance(rows, dict):
        return {"inputs": rows[:, :-1], "targets": rows[:, 1:]}
    targets = rows["targets"]
    return rows | {"targets": targets if targets.ndim == 2 else jnp.moveaxis(targets, 1, 0)}


def count(batch: Batch) -> Array:
    """Targets that are counted, of one loop."""
    targets = batch["targets"]
    return jnp.sum((targets if targets.ndim == 2 else targets[-1]) >= 0)
