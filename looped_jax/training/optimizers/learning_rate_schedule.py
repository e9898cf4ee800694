"""The learning rate over a run: up, along, down; all groups have the same."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from looped_jax.config.settings import OptimConfig

Array = jax.Array


def learning_rate_multiplier(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, plateau, linear warm-down, as shares of `steps`; takes the 0-based step."""
    up, down = round(config.warmup_ratio * steps), round(config.warmdown_ratio * steps)

    def multiplier(step: Array) -> Array:
        rising = (step + 1) / max(up, 1)
        left = (steps - step) / max(down, 1)
        falling = left + (1 - left) * config.final_lr_fraction
        return jnp.where(step < up, rising, jnp.where(step <= steps - down, 1.0, falling))

    return multiplier


def same_until(config: OptimConfig, steps: int, other: int, done: int) -> bool:
    """Whether runs of `steps` and of `other` steps have had the same learning rates for `done`."""
    first, second = (learning_rate_multiplier(config, n) for n in (steps, other))
    so_far = jnp.arange(done)
    return bool(jnp.array_equal(first(so_far), second(so_far)))


def restarted(state: Any) -> Any:
    """An optimizer's state whose schedules begin anew and whose averages go on."""

    def anew(part: Any) -> Any:
        fresh = isinstance(part, optax.ScaleByScheduleState)
        return part._replace(count=jnp.zeros_like(part.count)) if fresh else part

    return jax.tree.map(anew, state, is_leaf=lambda p: isinstance(p, optax.ScaleByScheduleState))
