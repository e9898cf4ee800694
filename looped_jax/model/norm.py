"""The norms of the model, and what they divide by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.resolved import ModelConfig
from looped_jax.model.weights import weight

Array = jax.Array


class Norm(nnx.Module):
    """The norm that `model.norm` describes: of a layer's branch, or at the end of a loop.

    By default rms_norm, which has no weights. kind="layer" is that of Ba et al., "Layer
    Normalization", 2016 (arXiv 1607.06450), with gain and bias or without.
    """

    def __init__(self, config: ModelConfig):
        ones, zeros = jnp.ones((config.width,)), jnp.zeros((config.width,))
        self._settings = config.norm
        self.gain = weight(ones, "embed", group="vector") if config.norm.gain else None
        self.bias = weight(zeros, "embed", group="vector") if config.norm.bias else None

    def __call__(self, x: Array) -> Array:
        """x [..., D] normed over the last axis, in float32 at least; keeps dtype."""
        with jax.named_scope("norm"):
            wide = _wide(x)
            if self._settings.kind == "layer":
                wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
            wide = wide * jax.lax.rsqrt(_mean_square(wide, self._settings.eps))
            wide = wide if self.gain is None else wide * self.gain[...]
            wide = wide if self.bias is None else wide + self.bias[...]
            return wide.astype(x.dtype)


@jax.custom_vjp
def rms_norm(x: Array) -> Array:
    """x / rms(x) over the last axis, in float32 at least, without a learned scale; keeps dtype."""
    with jax.named_scope("norm"):
        wide = _wide(x)
        return (wide * jax.lax.rsqrt(_mean_square(wide))).astype(x.dtype)


def _rms_norm_forward(x: Array) -> tuple[Array, Array]:
    return rms_norm(x), x


def _rms_norm_backward(x: Array, gradient: Array) -> tuple[Array]:
    with jax.named_scope("norm"):
        wide, gradient = _wide(x), _wide(gradient)
        inverse = jax.lax.rsqrt(_mean_square(wide))
        along = jax.lax.platform_dependent(gradient * wide, tpu=_mean_by_product, default=_mean)
        return (((gradient - wide * (along * jnp.square(inverse))) * inverse).astype(x.dtype),)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _mean(x: Array) -> Array:
    return jnp.broadcast_to(jnp.mean(x, axis=-1, keepdims=True), x.shape)


def _mean_by_product(x: Array) -> Array:
    """The same by a TPU's matrix unit, which leaves the mean where it is needed: in every lane."""
    width = x.shape[-1]
    if width > 128:
        return _mean(x)
    return jnp.matmul(x, jnp.ones((width, width), x.dtype), precision="high") / width


def rms(x: Array) -> Array:
    """What rms_norm divides x [..., D] by: [..., 1], float32 at least."""
    return jnp.sqrt(_mean_square(_wide(x)))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _mean_square(wide: Array, eps: float | None = None) -> Array:
    """Over the last axis [..., 1], with what keeps it from zero."""
    least = jnp.finfo(wide.dtype).eps if eps is None else eps
    return jnp.mean(wide * wide, axis=-1, keepdims=True) + least
