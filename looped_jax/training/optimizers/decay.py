"""Muon's weight decay, decoupled: with the rate of each matrix, and cautious if asked.

u ← u + √max(1, outputs / inputs) · λ_t · W, with u the update that the rate then multiplies;
cautious: where u · W ≥ 0, so that decay never works against the update. An update of zero lets all
of it through. Source: Chen et al., "Cautious weight decay", 2025 (arXiv 2510.12402).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def shape_factor(shape: tuple[int, ...]) -> float:
    """√max(1, outputs / inputs), with which Muon's rate is multiplied."""
    inputs, outputs = shape
    return max(1, outputs / inputs) ** 0.5


def add_decay(decay: optax.Schedule, *, cautious: bool) -> optax.GradientTransformation:
    """For kernels (inputs, outputs); `decay` gives λ_t."""

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(updates, state: optax.ScaleByScheduleState, params=None):
        rate = decay(state.count)

        def decayed(u: Array, w: Array) -> Array:
            own = shape_factor(w.shape) * rate * w
            return u + (jnp.where(u * w >= 0, own, 0) if cautious else own)

        updates = jax.tree.map(decayed, updates, params)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)
