"""One transformer block: attention with a separate query source, then a squared-ReLU MLP.

B batch, T time, D width, H heads, G key/value heads, Dh head width, F hidden, R latent rank.
All matrices are stored (in, out) in float32, have no bias, and act on rows: y = x @ w.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.resolved import ModelConfig
from looped_jax.model.linear import linear
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.base import Here, Part, make_parts, through
from looped_jax.model.probe import BLIND, View
from looped_jax.model.weights import weight

Array = jax.Array
Rope = tuple[Array, Array]
Parts = Mapping[str, Part]


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


def uniform(rngs: nnx.Rngs, fan_in: int, fan_out: int) -> Array:
    """[fan_in, fan_out] of variance 1 / fan_in."""
    bound = (3 / fan_in) ** 0.5
    return jax.random.uniform(rngs.params(), (fan_in, fan_out), minval=-bound, maxval=bound)


def product(name: str, x: Array, w: nnx.Param, here: Here, parts: Parts) -> Array:
    """x [B, T, in] @ w [in, out], and what parts make of it; `name` is the matrix's."""
    here = here._replace(matrix=name, source=x)
    return through(parts, "product", linear(x, w[...]), here, place=f"product_{name}")


class Attention(nnx.Module):
    """Causal multi-head attention; queries may come from another stream than keys and values.

    Grouped-query with G < H. With attention="mla", keys and values are projected up from one
    normalised latent of width R (multi-head latent attention).
    """

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs):
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
        self, query_source: Array, source: Array, here: Here, view: View, parts: Parts
    ) -> Array:
        """[B, T, D] normalised sources of queries, and of keys and values -> [B, T, D]."""
        query = self._heads(product("query", query_source, self.query, here, parts))
        if self.latent is not None:
            source = rms_norm(product("latent", source, self.latent, here, parts))
        key = self._heads(product("key", source, self.key, here, parts))
        value = self._heads(product("value", source, self.value, here, parts))
        query = through(parts, "query", query, here)
        key, value = through(parts, "key", key, here), through(parts, "value", value, here)
        query, key = rms_norm(rotate(query, here.rope)), rms_norm(rotate(key, here.rope))
        query, key = view("query", here.layer, query), view("key", here.layer, key)
        value = view("value", here.layer, value)
        with jax.named_scope("mix"):
            mixed = here.history.attend(query, key, value, self.window)
        mixed = through(parts, "mixed", mixed, here)
        return product("out", mixed.reshape(query_source.shape), self.out, here, parts)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


class MLP(nnx.Module):
    """down(relu(up(x))²), hidden width F = 4 D."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = weight(uniform(rngs, width, 4 * width), "embed", "mlp")
        self.down = weight(jnp.zeros((4 * width, width)), "mlp", "embed")

    def __call__(self, x: Array, here: Here, parts: Parts) -> Array:
        hidden = jnp.square(jax.nn.relu(product("up", x, self.up, here, parts)))
        return product("down", hidden, self.down, here, parts)


class Block(nnx.Module):
    """Pre-norm residual block: x += attention, x += MLP; parts act at their sites."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        self.attention = Attention(config, config.windows()[layer], rngs=rngs)
        self.mlp = MLP(config.width, rngs=rngs)
        self.parts = make_parts(config, layer, rngs=rngs)

    def __call__(self, x: Array, query_source: Array, here: Here, view: View = BLIND) -> Array:
        """Stream x [B, T, D], and what queries are taken from [B, T, D] -> stream [B, T, D]."""
        parts, layer = self.parts, here.layer
        with jax.named_scope("attention"):
            query_source, source = rms_norm(query_source), rms_norm(x)
            source = through(parts, "attention_input", source, here)
            out = self.attention(query_source, source, here, view, parts)
            x = x + view("attention", layer, through(parts, "attention_output", out, here))
        x = through(parts, "attention_sum", x, here)
        x = through(parts, "stream", x, here, place="mlp_stream")
        with jax.named_scope("mlp"):
            out = self.mlp(through(parts, "mlp_input", rms_norm(x), here), here, parts)
            x = x + view("mlp", layer, through(parts, "mlp_output", out, here))
        return view("block", layer, through(parts, "block_output", x, here))
