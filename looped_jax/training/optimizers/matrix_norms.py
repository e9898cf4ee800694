"""What an update is scaled to around its orthogonalisation; in float32, of whole matrices.

Source: nanochat of July 2026. Rows are outputs: the last axis of a kernel (inputs, outputs).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def equal_rows(matrices: Array, *, outputs: int) -> Array:
    """Each row of [N, a, b] at the mean norm ‖G‖ / √R of all R rows; axis `outputs` counts them."""
    x = matrices.astype(jnp.float32)
    inputs = -3 - outputs  # the other one of −1 and −2
    rows = jnp.linalg.norm(x, axis=inputs, keepdims=True)
    mean = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) / x.shape[outputs] ** 0.5
    return (x * (mean / jnp.maximum(rows, 1e-6))).astype(matrices.dtype)


def full_norm(matrices: Array) -> Array:
    """[N, a, b] at the norm √min(a, b) that orthogonal ones have; zeros stay zeros."""
    x = matrices.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    wanted = min(x.shape[-2:]) ** 0.5
    return (x * (wanted / jnp.maximum(norm, 1e-6))).astype(matrices.dtype)
