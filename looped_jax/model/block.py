"""One transformer block: attention with a separate query source, then a squared-ReLU MLP.

B batch, T time, D width, H heads, G key/value heads, Dh head width, F hidden, R latent rank.
All matrices are stored (in, out) in float32, have no bias, and act on rows: y = x @ w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config import ModelConfig
from looped_jax.model.attention_kernels import Attend, plain
from looped_jax.model.linear import linear
from looped_jax.model.taps import tap
from looped_jax.model.weights import weight

Array = jax.Array
Rope = tuple[Array, Array]
Mix = Callable[[Array, Array, Array, int | None], tuple[Array, Any]]


def rms_norm(x: Array) -> Array:
    """x / rms(x) over the last axis, in float32 at least, without a learned scale; keeps dtype."""
    with jax.named_scope("norm"):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + jnp.finfo(wide.dtype).eps)).astype(x.dtype)


def rope_tables(positions: Array, head_dim: int, dtype: jnp.dtype) -> Rope:
    """Cosines and sines [..., T, 1, Dh/2] for integer `positions` [..., T]; base 10000.

    Rounded to bfloat16 whatever the compute type, as the reference keeps them: weights trained
    with rounded angles expect them.
    """
    frequency = 10_000.0 ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = (
        table.astype(jnp.bfloat16).astype(dtype) for table in (jnp.cos(angle), jnp.sin(angle))
    )
    return cos, sin


def rotate(x: Array, rope: Rope) -> Array:
    """Rotary position embedding of x [B, T, H, Dh]; pairs dimensions j and j + Dh/2."""
    cos, sin = rope
    with jax.named_scope("rope"):
        x1, x2 = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)


def without_past(attend: Attend) -> Mix:
    """Attention among the tokens of this call alone."""

    def mix(query: Array, key: Array, value: Array, window: int | None) -> tuple[Array, None]:
        return attend(query, key, value, window), None

    return mix


PLAIN = without_past(plain)


def uniform(rngs: nnx.Rngs, fan_in: int, fan_out: int) -> Array:
    """[fan_in, fan_out] of variance 1 / fan_in."""
    bound = (3 / fan_in) ** 0.5
    return jax.random.uniform(rngs.params(), (fan_in, fan_out), minval=-bound, maxval=bound)


class Attention(nnx.Module):
    """Causal multi-head attention; queries may come from another stream than keys and values.

    Grouped-query with G < H. With attention="mla", keys and values are projected up from one
    normalised latent of width R (multi-head latent attention).
    """

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs):
        assert config.width and config.heads and config.kv_heads
        width, rank = config.width, config.latent_rank
        self.head_dim, self.window = config.head_dim, window
        kv_width = config.kv_heads * config.head_dim
        self.query = weight(uniform(rngs, width, width), "embed", "heads")
        latent = config.attention == "mla"
        self.latent = weight(uniform(rngs, width, rank), "embed", "latent") if latent else None
        source, axis = (rank, "latent") if latent else (width, "embed")
        self.key = weight(uniform(rngs, source, kv_width), axis, "heads")
        self.value = weight(uniform(rngs, source, kv_width), axis, "heads")
        self.out = weight(jnp.zeros((width, width)), "heads", "embed")

    def __call__(
        self, query_source: Array, source: Array, rope: Rope, mix: Mix = PLAIN
    ) -> tuple[Array, Any]:
        """[B, T, D] normalised sources of queries, and of keys and values -> [B, T, D].

        `mix` is how queries meet keys; what it returns beside the mixed values is passed on.
        """
        query = self._heads(linear(query_source, self.query[...]))
        if self.latent is not None:
            source = rms_norm(linear(source, self.latent[...]))
        key, value = (self._heads(linear(source, w[...])) for w in (self.key, self.value))
        query, key = rms_norm(rotate(query, rope)), rms_norm(rotate(key, rope))
        with jax.named_scope("mix"):
            mixed, memory = mix(query, key, value, self.window)
        return linear(mixed.reshape(query_source.shape), self.out[...]), memory

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


class MLP(nnx.Module):
    """down(relu(up(x))²), hidden width F = 4 D."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = weight(uniform(rngs, width, 4 * width), "embed", "mlp")
        self.down = weight(jnp.zeros((4 * width, width)), "mlp", "embed")

    def __call__(self, x: Array) -> Array:
        return linear(jnp.square(jax.nn.relu(linear(x, self.up[...]))), self.down[...])


class Block(nnx.Module):
    """Pre-norm residual block: x += attention, x += MLP."""

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs):
        assert config.width
        self.attention = Attention(config, window, rngs=rngs)
        self.mlp = MLP(config.width, rngs=rngs)

    def __call__(
        self,
        x: Array,
        query_source: Array,
        rope: Rope,
        mix: Mix = PLAIN,
        taps: Array | None = None,
    ) -> tuple[Array, Any]:
        """Stream x [B, T, D], and what queries are taken from [B, T, D] -> stream [B, T, D]."""
        with jax.named_scope("attention"):
            out, memory = self.attention(rms_norm(query_source), rms_norm(x), rope, mix)
            x = x + tap(out, taps, "attention")
        with jax.named_scope("mlp"):
            x = x + tap(self.mlp(rms_norm(x)), taps, "mlp")
        return tap(x, taps, "block"), memory
