"""The one norm of the model, and what it divides by."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def rms_norm(x: Array) -> Array:
    """x / rms(x) over the last axis, in float32 at least, without a learned scale; keeps dtype."""
    with jax.named_scope("norm"):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + jnp.finfo(wide.dtype).eps)).astype(x.dtype)


def rms(x: Array) -> Array:
    """What rms_norm divides x [..., D] by: [..., 1], float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.finfo(wide.dtype).eps)
