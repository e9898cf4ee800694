"""What each group of weights is updated with: its own settings, its parent's, or optim's.

The rates of tables and heads fall with the width as nanochat's do (Karpathy, 2025), and grow with
the root of the batch (Malladi et al., "On the SDEs and scaling rules for adaptive gradient
algorithms", 2022, arXiv 2205.10287).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from looped_jax.config.settings import OptimConfig
from looped_jax.errors import ConfigError
from looped_jax.model.weight_groups import lineage
from looped_jax.training.optimizers.base import RunScale

Array = jax.Array
REFERENCE_WIDTH = 768


@dataclass(frozen=True)
class GroupRates:
    """Of one group. learning_rate: at each step, with the schedule and all scaling."""

    learning_rate: optax.Schedule
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def of_group(
    config: OptimConfig,
    group: str,
    run: RunScale,
    *,
    learning_rate: float,
    beta2: float | None = None,
    weight_decay: float | None = None,
    width_scaling: bool = True,
) -> GroupRates:
    """The rates of a group whose kind has those given, and else those of `config`, by default."""

    def chosen(name: str, default: Any) -> Any:
        return _given(config, group, name, default)

    peak = chosen("learning_rate", learning_rate)
    if chosen("width_scaling", width_scaling):
        peak = peak * (run.width / REFERENCE_WIDTH) ** -0.5
    if config.reference_batch_tokens and chosen("batch_scaling", True):
        assert run.tokens_per_step is not None
        peak = peak * (run.tokens_per_step / config.reference_batch_tokens) ** 0.5
    return GroupRates(
        learning_rate=_scheduled(peak, run.multiplier, chosen("warmup_steps", 0)),
        beta1=chosen("beta1", config.beta1),
        beta2=chosen("beta2", config.beta2 if beta2 is None else beta2),
        eps=chosen("eps", config.eps),
        weight_decay=chosen(
            "weight_decay", config.weight_decay if weight_decay is None else weight_decay
        ),
    )


def refuse(config: OptimConfig, group: str, names: tuple[str, ...], instead: str) -> None:
    """Raise ConfigError where the group is given a setting that its update does not have."""
    for name in names:
        if (value := getattr(config.groups[group], name)) is not None:
            raise ConfigError(f"optim.groups.{group}.{name}={value} has no effect; {instead}")


def own_rates(config: OptimConfig, groups: Collection[str]) -> dict[str, float]:
    """Learning rates that `groups` or those above them are given, by the name of the setting."""
    found = sorted({one for group in groups for one in lineage(group)})
    own = {group: config.groups[group].learning_rate for group in found}
    return {f"optim.groups.{g}.learning_rate": rate for g, rate in own.items() if rate is not None}


def _given(config: OptimConfig, group: str, name: str, default: Any) -> Any:
    given = (getattr(config.groups[one], name) for one in lineage(group))
    return next((value for value in given if value is not None), default)


def _scheduled(peak: float, multiplier: optax.Schedule, warmup: int) -> optax.Schedule:
    if not warmup:
        return lambda step: peak * multiplier(step)
    return lambda step: peak * multiplier(step) * jnp.minimum((step + 1) / warmup, 1.0)
