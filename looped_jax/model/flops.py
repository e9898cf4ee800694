"""What a model costs: parameters, and floating-point operations per token that count the loops.

The reference's figure ignores K and windows, which at L = 6, K = 12 reports a third of the work;
it is kept beside ours so that runs can be compared with its logs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

from looped_jax.config.resolved import ModelConfig
from looped_jax.model import transformer


@dataclass(frozen=True)
class Cost:
    """Counts of one model. FLOPs are per token of a training step: forward 1/3, backward 2/3.

    parameters: all weights, padding included; looped: those in the blocks, used K times
    flops: true training FLOPs per token; reference_flops: as the reference counts, K ignored
    """

    parameters: int
    looped: int
    flops: float
    reference_flops: float


@functools.lru_cache(maxsize=256)
def count(config: ModelConfig) -> Cost:
    """Parameters and training FLOPs per token of a resolved config, read off its program.

    The products of the forward pass, scans times their length, and of the head for each state that
    the objective has it read; three times for training. Attention counts every key that a window
    shows (12 · H · Dh per key and layer, not halved for causality, the field's convention);
    recomputation for rematerialisation is not counted.
    """
    weights = transformer.weights(config)
    looped = sum(w.size for name, w in weights.items() if name.startswith("blocks."))
    attention = 12 * config.attention_width * config.seq_len * config.layers
    return Cost(
        parameters=sum(w.size for w in weights.values()),
        looped=looped,
        flops=3 * (config.read_outs() * head(config) + _forward(config) / config.seq_len),
        reference_flops=3 * head(config) + 6 * looped + attention,
    )


@functools.lru_cache(maxsize=256)
def head(config: ModelConfig) -> float:
    """FLOPs of the head for one state, forward alone."""

    def run(params: transformer.Params, h: jax.Array) -> jax.Array:
        return transformer.read_out(config, params, h)

    h = jax.ShapeDtypeStruct((1, config.width), config.dtype)
    return products(jax.make_jaxpr(run)(transformer.init_shapes(config), h).jaxpr)


@functools.lru_cache(maxsize=256)
def loop(config: ModelConfig) -> float:
    """FLOPs per token of one more loop, forward alone."""
    more = dataclasses.replace(config, loops=config.loops + 1)
    return (_forward(more) - _forward(config)) / config.seq_len


def _forward(config: ModelConfig) -> float:
    """FLOPs of the products of one row's forward pass, without the head."""
    tokens = jax.ShapeDtypeStruct((1, config.seq_len), jnp.int32)

    def run(params: transformer.Params, tokens: jax.Array) -> jax.Array:
        return transformer.forward(config, params, tokens, attend=_every_visible_key).hidden

    return products(jax.make_jaxpr(run)(transformer.init_shapes(config), tokens).jaxpr)


def _every_visible_key(
    query: jax.Array, key: jax.Array, value: jax.Array, window: int | None
) -> jax.Array:
    """As much work as attention that hides nothing inside of a window; not its numbers."""
    groups, seen = query.shape[2] // key.shape[2], min(window or key.shape[1], key.shape[1])
    key, value = (jnp.repeat(x[:, :seen], groups, axis=2) for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    return jnp.einsum("bhqk,bkhd->bqhd", scores, value)


def products(jaxpr: Any) -> float:
    """FLOPs of all dot_general of a jaxpr, inner ones as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            inner = math.prod(sizes[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inside = list(jax.extend.core.jaxprs_in_params(equation.params))
        if equation.params.get("branches_platforms"):  # a device's own way to what the last says
            inside = inside[-1:]
        total += times * sum(map(products, inside))
    return total
