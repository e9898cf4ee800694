"""What training minimises: which loops are read, and what is asked of each.

A batch is a dict: inputs [B, T]; targets [B, T] shared by all loops that are read, or [N, B, T] of
its own for each of them; negative targets are left out; where anything draws, uint32 seeds [B], see
model/random_numbers.py. An objective never takes part in validation, which scores the same targets
at every loop count.

One of your own is registered as those in this folder, and is then a choice of `model.loss`.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from looped_jax.config.registry import OBJECTIVES
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ArgumentError
from looped_jax.model import loss

Array = jax.Array
Batch = dict[str, Array]
Params = dict[str, Array]


class Objective:
    """Mean of the token losses after some loops.

    Reads zero-based loops; a subclass chooses them, and may weigh their losses otherwise, with
    `total`, or minimise something else, with `loss`. One that cannot be, raises ConfigError in
    `loops`, which is asked first. One that draws random numbers says so.
    """

    draws: ClassVar[bool] = False
    weighs_beforehand: ClassVar[bool] = True  # what each loss counts for, so that its gradients can
    # be taken with the logits at hand; one that overrides `loss` with losses of tokens does not

    def loops(self, config: ModelConfig) -> tuple[int, ...]:
        """Zero-based loops whose states are read, the last one included."""
        return (config.loops - 1,)

    def read_outs(self, config: ModelConfig) -> int:
        """How many states of a token the head reads."""
        return len(self.loops(config))

    def total(self, config: ModelConfig, nats: Array) -> Array:
        """One number of the summed losses [N], linear in them."""
        return nats.mean()

    def weights(self, config: ModelConfig) -> Array:
        """What each loop's summed losses count for in `total`, float32 [N].

        Raises ArgumentError for a total that is not linear: the head takes gradients of the losses
        before their sums are known.
        """
        count = len(self.loops(config))
        probes = np.stack([np.zeros(count), np.arange(1.0, count + 1), -np.ones(count)])
        # Asked while tracing, once a program, whatever transfers a user forbids in running it.
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
            weights, totals = (
                np.array([self.total(config, jnp.asarray(one, jnp.float32)) for one in sums])
                for sums in (np.eye(count), probes)
            )
        with np.errstate(invalid="ignore"):  # what is not linear may be no number
            linear = np.allclose(totals, probes @ weights, rtol=1e-4, atol=1e-5)
        if not linear:
            raise ArgumentError(
                f"total of objective {config.loss} is not linear in the summed losses; override "
                "loss instead, as SELF_WEIGHTED does"
            )
        return jnp.asarray(weights, jnp.float32)

    def loss(
        self, config: ModelConfig, params: Params, hidden: Array, batch: Batch
    ) -> tuple[Array, Array]:
        """What is differentiated, summed over tokens, and the summed losses [N], which are logged.

        The sums of all devices and micro-batches are divided by the number of targets at the end.
        """
        targets = batch["targets"]
        return loss.weighted_losses(config, params, hidden, targets, self.weights(config))


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


def counted(batch: Batch) -> Array:
    """Which targets [B, T] of one loop are counted."""
    targets = batch["targets"]
    return (targets if targets.ndim == 2 else targets[-1]) >= 0


def count(batch: Batch) -> Array:
    """Targets that are counted, of one loop."""
    return jnp.sum(counted(batch))
