"""Windows into the loop: gradient taps for training, and everything in the open for one short look.

A tap is a scalar that rides beside a tensor through the forward pass and changes nothing. In the
backward pass it receives the squared norm of the gradient that arrives there. Fed to the scan as
input, [K, L, 3] taps tell every loop and layer apart, in the one pass that trains anyway and
without keeping an activation.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from looped_jax.config import ModelConfig

Array = jax.Array
TAPS = ("attention", "mlp", "block")  # outputs of a layer's parts, and the stream it leaves


class Trace(NamedTuple):
    """All states of one pass. B batch, T time, D width, H heads, K loops, L layers.

    hidden: [K, B, T, D] normalised state after each loop, what the head reads
    streams: [K, L, B, T, D] stream after each layer, before the loop's closing norm
    attention: [K, L, B, H, T, T] float32 weights of each query (second to last axis) over keys
    """

    hidden: Array
    streams: Array
    attention: Array


def closed_taps(config: ModelConfig, loops: int | None = None) -> Array:
    """Taps to differentiate by: zeros float32 [K, L, 3], the last axis as TAPS names it."""
    return jnp.zeros((loops or config.loops, config.layers, len(TAPS)), jnp.float32)


def tap(x: Array, taps: Array | None, name: str) -> Array:
    """x unchanged; the gradient of its entry in `taps` [3] is ‖gradient of x‖², in float32."""
    return x if taps is None else _tapped(x, taps[TAPS.index(name)])


@jax.custom_vjp
def _tapped(x: Array, scalar: Array) -> Array:
    return x


def _forward(x: Array, scalar: Array) -> tuple[Array, None]:
    return x, None


def _backward(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient, jnp.sum(jnp.square(gradient.astype(jnp.float32)))


_tapped.defvjp(_forward, _backward)


def mean_norm(x: Array) -> Array:
    """Mean over tokens of the L2 norm of x [B, T, D], float32."""
    return jnp.mean(jnp.linalg.norm(x.astype(jnp.float32), axis=-1))


def attend_openly(
    query: Array, key: Array, value: Array, window: int | None
) -> tuple[Array, Array]:
    """Plain causal attention that also returns its weights [B, H, T, T], float32."""
    batch, time, heads, head_dim = query.shape
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    behind = jnp.arange(time)[:, None] - jnp.arange(time)
    visible = (behind >= 0) & (behind < (window or time))
    weights = jax.nn.softmax(jnp.where(visible, scores / head_dim**0.5, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value), weights
