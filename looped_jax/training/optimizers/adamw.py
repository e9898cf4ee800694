"""AdamW: of groups beside Muon, or of all weights. Source: Loshchilov & Hutter, 2019."""

from __future__ import annotations

from dataclasses import dataclass

import optax

from looped_jax.config.options import setting
from looped_jax.config.registry import OPTIMIZERS
from looped_jax.training.optimizers import group_rates
from looped_jax.training.optimizers.base import Optimizer
from looped_jax.training.optimizers.group_rates import GroupRates

RATES = {
    "table": "embedding_learning_rate",
    "head": "head_learning_rate",
    "vector": "vector_learning_rate",
}  # of the kinds of groups that never have another


@dataclass(frozen=True)
class AdamWSettings:
    """Of AdamW for all weights."""

    matrix_learning_rate: float = setting(0.003, "of the matrices, times (D / 768) ** -0.5")


@OPTIMIZERS.register("adamw")
class AdamW(Optimizer):
    """AdamW for every weight, the groups at their own rates."""

    Settings = AdamWSettings
    rates = tuple(RATES.values())
    takes_groups = True

    def transformation(self, config, weights, run, mesh=None):
        rates = {kind: getattr(config, name) for kind, name in RATES.items()}
        rates["matrix"] = config.optimizers["adamw"].matrix_learning_rate
        kinds = {weight.group: weight.kind for weight in weights.values()}
        groups = {
            group: adamw(group_rates.of_group(config, group, run, learning_rate=rates[kind]))
            for group, kind in sorted(kinds.items())
        }
        return optax.partition(groups, {name: weight.group for name, weight in weights.items()})


def adamw(rates: GroupRates) -> optax.GradientTransformation:
    """optax's, with what one group is given."""
    return optax.adamw(
        rates.learning_rate,
        b1=rates.beta1,
        b2=rates.beta2,
        eps=rates.eps,
        weight_decay=rates.weight_decay,
    )
