"""The loop rules: what the state of the previous loop does to the next one.

A rule is two functions, called inside the scan over loops. `h` is the state after the previous
loop, zero in the first one; `first` is a traced bool, true in the first loop, where every rule is
a plain transformer. `e` is the embedding before normalisation. All are [B, T, D].

Source: "Simply Stabilizing the Loop via Fully Looped Transformer", arXiv 2605.18797.

To try an idea, add a rule to RULES: it appears in `model.variant` and in every test that runs
over all rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from looped_jax.model.block import rms_norm

Array = jax.Array


class LoopRule(NamedTuple):
    """How a loop begins and what each of its layers sees of the previous loop.

    start: (e, h, first) -> stream x at the start of the loop
    inject: (x, h, layer, first) -> (stream x, what the layer's queries are taken from)
    same_start: the first layer's stream, and so its keys and values, are the same in every loop
    """

    start: Callable[[Array, Array, Array], Array]
    inject: Callable[[Array, Array, int, Array], tuple[Array, Array]]
    same_start: bool = False


def _restart(e: Array, h: Array, first: Array) -> Array:
    return rms_norm(e)


def _restart_with_state(e: Array, h: Array, first: Array) -> Array:
    return rms_norm(e + h)  # h is zero in the first loop


def _continue(e: Array, h: Array, first: Array) -> Array:
    return jnp.where(first, rms_norm(e), h)


def _nothing(x: Array, h: Array, layer: int, first: Array) -> tuple[Array, Array]:
    return x, x


def _queries(x: Array, h: Array, layer: int, first: Array) -> tuple[Array, Array]:
    return x, jnp.where(first, x, h)


def _queries_of_first_layer(x: Array, h: Array, layer: int, first: Array) -> tuple[Array, Array]:
    return _queries(x, h, layer, first) if layer == 0 else (x, x)


def _residual(x: Array, h: Array, layer: int, first: Array) -> tuple[Array, Array]:
    x = jnp.where(first, x, rms_norm(x + h))
    return x, x


RULES = {
    # fully looped: every layer asks with the previous loop's output, and answers come from x only,
    # so a loop can change where a token looks but cannot add content directly
    "FLT": LoopRule(start=_restart, inject=_queries, same_start=True),
    "FLT_res": LoopRule(start=_restart, inject=_residual),
    "LT_ia": LoopRule(start=_restart, inject=_queries_of_first_layer, same_start=True),
    "LT_i": LoopRule(start=_restart_with_state, inject=_nothing),
    "LT": LoopRule(start=_continue, inject=_nothing),
}
