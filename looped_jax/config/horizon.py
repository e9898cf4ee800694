"""How long a run is: as many steps as given, else what FLOPs pay for, else tokens per parameter."""

from __future__ import annotations

from collections.abc import Callable

from looped_jax.config import depth_scaling
from looped_jax.config.settings import TrainSettings


def steps(
    train: TrainSettings,
    *,
    tokens_per_step: int,
    parameters: Callable[[], float],
    flops_per_token: Callable[[], float],
) -> int:
    """At least 1.

    parameters: those that train.scaled_by counts; flops_per_token: of training, with all loops.
    Each is asked for where it decides.
    """
    if train.steps is not None:
        return train.steps
    if train.target_flops is not None:
        return max(1, round(train.target_flops / (flops_per_token() * tokens_per_step)))
    return max(1, depth_scaling.tokens(train.tokens_per_parameter, parameters()) // tokens_per_step)


def reason(train: TrainSettings) -> str:
    """Which setting decides, in words."""
    if train.steps is not None:
        return f"train.steps={train.steps}"
    if train.target_flops is not None:
        return f"train.target_flops={train.target_flops:g}"
    return f"train.tokens_per_parameter={train.tokens_per_parameter:g}"
