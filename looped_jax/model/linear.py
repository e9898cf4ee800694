"""The one matrix product of the model: computes in the compute type, sums gradients in float32.

A looped weight is used K times a step, and in bfloat16 the sum of K gradients would lose what the
small ones add. Weights therefore come in as float32 masters and are cast where they are used; the
compiler sees that the cast is the same in every loop and does it once, before them. Of a CutWeight
only this device's piece comes in; see model/cut_weight.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from looped_jax.model.cut_weight import CutWeight

Array = jax.Array
PRODUCT = "product"


def linear(x: Array, weight: Array | CutWeight, out_dtype: str | None = None) -> Array:
    """x [..., in] @ weight [in, out] in the type of x; the result in `out_dtype`, as x by default.

    Gradient of x in its type; of the weight in the weight's, as one product over all tokens. The
    result is called PRODUCT, for those who choose what the backward pass keeps.
    """
    return checkpoint_name(_product(x, weight, 1, out_dtype), PRODUCT)


def to_heads(x: Array, weight: Array | CutWeight, heads: int) -> Array:
    """x [..., in] @ weight [in, H · Dh] as [..., H, Dh]; otherwise as linear.

    The product itself has heads, and no reshape comes after it: a compiler may then lay its result
    out as attention wants it, where it would else copy it. So with what comes back.
    """
    weight = weight.reshape(len(weight), heads, -1)
    return checkpoint_name(_product(x, weight, 1, None), PRODUCT)


def from_heads(x: Array, weight: Array | CutWeight) -> Array:
    """x [..., H, Dh] @ weight [H · Dh, out] as [..., out]; otherwise as to_heads."""
    weight = weight.reshape(*x.shape[-2:], -1)
    return checkpoint_name(_product(x, weight, 2, None), PRODUCT)


def _product(x: Array, weight: Array | CutWeight, axes: int, out_dtype: str | None) -> Array:
    of = _cut_linear if isinstance(weight, CutWeight) else _linear
    return of(x, weight, axes, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear(x: Array, weight: Array, axes: int, out_dtype: str | None) -> Array:
    """Over the last `axes` of x and as many first ones of the weight."""
    return jnp.tensordot(x, weight.astype(x.dtype), axes, preferred_element_type=out_dtype)


def _forward(x: Array, weight: Array, axes: int, out_dtype: str | None):
    return _linear(x, weight, axes, out_dtype), (x, weight)


def _backward(axes: int, out_dtype: str | None, saved: tuple[Array, Array], gradient: Array):
    x, weight = saved
    # Without this cast a float32 gradient of the logits would make these products float32 too.
    gradient = gradient.astype(x.dtype)
    product, turned = (
        functools.partial(one, num_tokens=x.ndim - axes, dtype=weight.dtype)
        for one in (_over_tokens, _narrow_first)
    )
    if math.prod(weight.shape[:axes]) > math.prod(weight.shape[axes:]):
        of_weight = jax.lax.platform_dependent(x, gradient, cpu=turned, default=product)
    else:
        of_weight = product(x, gradient)
    out = tuple(range(axes - weight.ndim, 0))
    of_x = jnp.tensordot(gradient, weight.astype(x.dtype), (out, out))
    return of_x, of_weight


def _over_tokens(x: Array, gradient: Array, *, num_tokens: int, dtype: Any) -> Array:
    """[tokens..., in...] and [tokens..., out...] -> [in..., out...], a sum over all tokens."""
    tokens = tuple(range(num_tokens))
    return jnp.tensordot(x, gradient, (tokens, tokens), preferred_element_type=dtype)


def _narrow_first(x: Array, gradient: Array, *, num_tokens: int, dtype: Any) -> Array:
    """The same where x is the wider: XLA's CPU programs copy the first of both, turned round.

    The barrier keeps the compiler from changing their order again.
    """
    product = _over_tokens(gradient, x, num_tokens=num_tokens, dtype=dtype)
    of_out = range(gradient.ndim - num_tokens)
    return jnp.moveaxis(jax.lax.optimization_barrier(product), of_out, range(-len(of_out), 0))


_linear.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cut_linear(x: Array, weight: CutWeight, axes: int, out_dtype: str | None) -> Array:
    """As _linear of the whole weight; what is saved for the backward pass is the piece."""
    return _linear(x, weight.gather(x.dtype), axes, out_dtype)


def _cut_forward(x: Array, weight: CutWeight, axes: int, out_dtype: str | None):
    return _cut_linear(x, weight, axes, out_dtype), (x, weight)


def _cut_backward(
    axes: int, out_dtype: str | None, saved: tuple[Array, CutWeight], gradient: Array
):
    # Tied to the gradient, else a compiler keeps what a recomputed forward pass has gathered.
    (x, weight), gradient = jax.lax.optimization_barrier((saved, gradient))
    whole = weight.gather(x.dtype).astype(weight.piece.dtype)  # as float32, so that gradients are
    of_x, of_whole = _backward(axes, out_dtype, (x, whole), gradient)
    return of_x, weight.of_sum(of_whole)


_cut_linear.defvjp(_cut_forward, _cut_backward)
