"""What changes over a run: the rates of all groups, Muon's momentum and Muon's decay.

Schedules take the 0-based step, of N. Source: nanochat (Karpathy, 2025 and 2026).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from looped_jax.config.settings import OptimConfig

Array = jax.Array


def learning_rate_multiplier(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, plateau, warm-down; where they overlap the warm-up wins."""
    up, down = _warmup(config, steps), _warmdown(config, steps)

    def multiplier(step: Array) -> Array:
        rising = (step + 1) / max(up, 1)
        left = (steps - step) / max(down, 1)
        if config.warmdown_shape == "cosine":
            left = (1 - jnp.cos(jnp.pi * jnp.clip(left, 0.0, 1.0))) / 2
        falling = left + (1 - left) * config.final_lr_fraction
        return jnp.where(step < up, rising, jnp.where(step <= steps - down, 1.0, falling))

    return multiplier


def muon_momentum(config: OptimConfig, steps: int | None = None) -> optax.Schedule:
    """Linear from momentum_start to momentum_end, and to momentum_final while the rates fall.

    Where the two overlap the rise wins: a short run jumps. `steps` is needed for the fall alone.
    """
    rising = optax.linear_schedule(
        config.momentum_start, config.momentum_end, config.momentum_warmup_steps
    )
    if (final := config.optimizers["muon"].momentum_final) is None:
        return rising
    assert steps is not None
    down = _warmdown(config, steps)

    def momentum(step: Array) -> Array:
        left = (steps - step) / max(down, 1)
        falling = final + (config.momentum_end - final) * left
        rises = (step < config.momentum_warmup_steps) | (step <= steps - down)
        return jnp.where(rises, rising(step), falling)

    return momentum


def decay_multiplier(kind: str, steps: int) -> optax.Schedule:
    """What a weight decay is multiplied with: 1, 1 − t / N, or (1 + cos(π t / N)) / 2."""
    if kind == "linear":
        return lambda step: 1 - step / steps
    if kind == "cosine":
        return lambda step: (1 + jnp.cos(jnp.pi * (step / steps))) / 2
    return optax.constant_schedule(1.0)


def same_until(config: OptimConfig, steps: int, other: int, done: int) -> bool:
    """Whether schedules of `steps` and of `other` steps have been the same for `done`."""
    so_far, shape = jnp.arange(done), config.optimizers["muon"].decay_schedule

    def values(steps: int) -> list[Array]:
        found = [learning_rate_multiplier(config, steps)]
        if config.optimizer == "muon":
            found += [muon_momentum(config, steps), decay_multiplier(shape, steps)]
        return [jnp.broadcast_to(schedule(so_far), so_far.shape) for schedule in found]

    return all(map(jnp.array_equal, values(steps), values(other)))


def restarted(state: Any) -> Any:
    """An optimizer's state whose schedules begin anew and whose averages go on."""

    def anew(part: Any) -> Any:
        fresh = isinstance(part, optax.ScaleByScheduleState)
        return part._replace(count=jnp.zeros_like(part.count)) if fresh else part

    return jax.tree.map(anew, state, is_leaf=lambda p: isinstance(p, optax.ScaleByScheduleState))


def _warmup(config: OptimConfig, steps: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round(config.warmup_ratio * steps)


def _warmdown(config: OptimConfig, steps: int) -> int:
    if config.warmdown_rest:  # the last step of the rise, or the first of all, has the whole rate
        return steps - max(_warmup(config, steps) - 1, 0)
    if config.warmdown_steps is not None:
        return config.warmdown_steps
    return round(config.warmdown_ratio * steps)
