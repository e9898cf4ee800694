"""The bound on logits: c · tanh(z / c)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def soft_cap(z: Array, cap: float) -> Array:
    """z of any shape, bounded to ± cap. Its gradient keeps the result and nothing else.

    Source: Gemma 2 (arXiv 2408.00118), section 2.
    """
    return cap * jnp.tanh(z / cap)


def _forward(z: Array, cap: float) -> tuple[Array, Array]:
    capped = soft_cap(z, cap)
    return capped, capped


def _backward(cap: float, capped: Array, gradient: Array) -> tuple[Array]:
    return (gradient * (1 - jnp.square(capped / cap)),)


soft_cap.defvjp(_forward, _backward)
