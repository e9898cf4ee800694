"""The one matrix product of the model: computes in the compute type, sums gradients in float32.

A looped weight is used K times a step, and in bfloat16 the sum of K gradients would lose what the
small ones add. Weights therefore come in as float32 masters and are cast where they are used; the
compiler sees that the cast is the same in every loop and does it once, before them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
PRODUCT = "product"


def linear(x: Array, weight: Array, out_dtype: str | None = None) -> Array:
    """x [..., in] @ weight [in, out] in the type of x; the result in `out_dtype`, as x by default.

    Gradient of x in its type; of the weight in the weight's, as one product over all tokens. The
    result is called PRODUCT, for those who choose what the backward pass keeps.
    """
    return checkpoint_name(_linear(x, weight, out_dtype), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: Array, weight: Array, out_dtype: str | None) -> Array:
    return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=out_dtype)


def _forward(x: Array, weight: Array, out_dtype: str | None):
    return _linear(x, weight, out_dtype), (x, weight)


def _backward(out_dtype: str | None, saved: tuple[Array, Array], gradient: Array):
    x, weight = saved
    # Without this cast a float32 gradient of the logits would make these products float32 too.
    gradient = gradient.astype(x.dtype)
    tokens, arriving = (a.reshape(-1, a.shape[-1]) for a in (x, gradient))
    of_weight = jnp.matmul(tokens.T, arriving, preferred_element_type=weight.dtype)
    return gradient @ weight.astype(x.dtype).T, of_weight


_linear.defvjp(_forward, _backward)
