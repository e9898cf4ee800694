"""One transformer block: attention with a separate query source, then an MLP.

B batch, T time, D width, H heads, G key/value heads, Dh head width, F hidden, R latent rank.
All matrices are stored (in, out) in float32 and act on rows: y = x @ w.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.resolved import ModelConfig
from looped_jax.config.transformer_settings import InitSettings, RopeSettings
from looped_jax.model.linear import from_heads, linear, to_heads
from looped_jax.model.norm import Norm, rms_norm
from looped_jax.model.parts.base import Here, Part, make_parts, on_weights, through
from looped_jax.model.probe import BLIND, View
from looped_jax.model.weights import weight

Array = jax.Array
Rope = tuple[Array, Array]
Parts = Mapping[str, Part]
ROPE = RopeSettings()
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def rope_tables(
    positions: Array, head_dim: int, dtype: jnp.dtype, settings: RopeSettings = ROPE
) -> Rope:
    """Cosines and sines [..., T, 1, Dh/2] for integer `positions` [..., T].

    By default rounded to bfloat16 whatever the compute type, as the reference keeps them: weights
    trained with rounded angles expect them.
    """
    frequency = settings.base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = (
        table.astype(settings.dtype).astype(dtype) for table in (jnp.cos(angle), jnp.sin(angle))
    )
    return cos, sin


@jax.custom_vjp
def rotate(x: Array, rope: Rope) -> Array:
    """Rotary position embedding of x [B, T, H, Dh]; pairs dimensions j and j + Dh/2."""
    with jax.named_scope("rope"):
        return jax.lax.platform_dependent(x, *rope, tpu=_rotate_whole, default=_rotate_halves)


def _rotate_halves(x: Array, cos: Array, sin: Array) -> Array:
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)


def _rotate_whole(x: Array, cos: Array, sin: Array) -> Array:
    """The same in registers as wide as a head, half of which would be empty otherwise.

    A TPU's matrix unit swaps the halves, exactly: each of its sums has one term that is not zero.
    Moving lanes takes three times as long.
    """
    half = x.shape[-1] // 2
    swap = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=1)
    x = jax.lax.optimization_barrier(x)  # both terms read it: not to be computed twice
    other = jnp.matmul(x, swap, precision="highest")
    return x * jnp.concatenate([cos, cos], -1) + other * jnp.concatenate([sin, -sin], -1)


def _rotate_forward(x: Array, rope: Rope) -> tuple[Array, Rope]:
    return rotate(x, rope), rope


def _rotate_backward(rope: Rope, gradient: Array) -> tuple[Array, None]:
    """Turned back: angles follow from positions, which are whole numbers without gradients."""
    cos, sin = rope
    return rotate(gradient, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)


def uniform(rngs: nnx.Rngs, fan_in: int, fan_out: int, scale: float = 1.0) -> Array:
    """[fan_in, fan_out] of variance scale² / fan_in."""
    bound = scale * (3 / fan_in) ** 0.5
    return jax.random.uniform(rngs.params(), (fan_in, fan_out), minval=-bound, maxval=bound)


def inputs(
    rngs: nnx.Rngs, fan_in: int, fan_out: int, init: InitSettings, scale: float = 1.0
) -> Array:
    """[fan_in, fan_out] of what a branch begins with: as `uniform`, or normal of init.in_std."""
    if init.in_std is None:
        return uniform(rngs, fan_in, fan_out, scale)
    return init.in_std * jax.random.normal(rngs.params(), (fan_in, fan_out))


def outputs(rngs: nnx.Rngs, fan_in: int, fan_out: int, std: float) -> Array:
    """[fan_in, fan_out] of what a branch ends with: zero, or normal."""
    if std == 0:
        return jnp.zeros((fan_in, fan_out))
    return std * jax.random.normal(rngs.params(), (fan_in, fan_out))


def product(name: str, x: Array, w: nnx.Param, here: Here, parts: Parts) -> Array:
    """x [B, T, in] @ w [in, out], and what parts make of it; `name` is the matrix's."""
    here = here._replace(matrix=name, source=x)
    return through(parts, "product", linear(x, w[...]), here, place=f"product_{name}")


def heads_product(
    name: str, x: Array, w: nnx.Param, head_dim: int, here: Here, parts: Parts
) -> Array:
    """As `product`, [B, T, in] -> [B, T, heads, Dh]."""
    here = here._replace(matrix=name, source=x)
    heads = to_heads(x, w[...], w.shape[1] // head_dim)
    flat = heads.reshape(*x.shape[:-1], -1)  # as parts know it; without one this is undone
    return through(parts, "product", flat, here, place=f"product_{name}").reshape(heads.shape)


class Attention(nnx.Module):
    """Causal multi-head attention; queries may come from another stream than keys and values.

    Grouped-query with G < H. With attention="mla", keys and values are projected up from one
    normalised latent of width R (multi-head latent attention).
    """

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs):
        width, rank, heads_width = config.width, config.latent_rank, config.attention_width
        init = config.init
        self.head_dim, self.window, self.qk = config.head_dim, window, config.qk
        kv_width = config.kv_heads * config.head_dim
        self.query = weight(inputs(rngs, width, heads_width, init), "embed", "heads")
        latent = config.attention == "mla"
        self.latent = weight(inputs(rngs, width, rank, init), "embed", "latent") if latent else None
        source, axis = (rank, "latent") if latent else (width, "embed")
        self.key = weight(inputs(rngs, source, kv_width, init), axis, "heads")
        self.value = weight(inputs(rngs, source, kv_width, init), axis, "heads")
        out = outputs(rngs, heads_width, width, init.out_std)
        self.out = weight(out, "heads", "embed")

    def __call__(
        self, query_source: Array, source: Array, here: Here, view: View, parts: Parts
    ) -> Array:
        """[B, T, D] normalised sources of queries, and of keys and values -> [B, T, D]."""
        query = heads_product("query", query_source, self.query, self.head_dim, here, parts)
        normed = source
        if self.latent is not None:
            source = rms_norm(product("latent", source, self.latent, here, parts))
        key = heads_product("key", source, self.key, self.head_dim, here, parts)
        value = heads_product("value", source, self.value, self.head_dim, here, parts)
        here = here._replace(source=normed)
        query = through(parts, "query", query, here)
        key, value = through(parts, "key", key, here), through(parts, "value", value, here)
        query, key = self._placed(query, here.rope), self._placed(key, here.rope)
        query, key = view("query", here.layer, query), view("key", here.layer, key)
        value = view("value", here.layer, value)
        with jax.named_scope("mix"):
            act = on_weights(parts, here)
            history = here.history if act is None else here.history.with_weights(act)
            mixed = history.attend(query, key, value, self.window)
        mixed = through(parts, "mixed", mixed, here)
        here = here._replace(matrix="out", source=mixed.reshape(*mixed.shape[:2], -1))
        out = from_heads(mixed, self.out[...])
        return through(parts, "product", out, here, place="product_out")

    def _placed(self, x: Array, rope: Rope | None) -> Array:
        """Queries or keys with their position, normed and scaled."""
        x = rms_norm(x) if self.qk.norm == "before_rope" else x
        x = x if rope is None else rotate(x, rope)
        x = rms_norm(x) if self.qk.norm == "after_rope" else x
        return x if self.qk.scale == 1 else x * self.qk.scale


class MLP(nnx.Module):
    """down(f(up(x))), hidden width F = 4 D; f is relu² unless model.mlp says otherwise."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, init = config.width, config.init
        self._activation = config.mlp.activation
        self.up = weight(inputs(rngs, width, 4 * width, init, init.up_scale), "embed", "mlp")
        self.down = weight(outputs(rngs, 4 * width, width, init.out_std), "mlp", "embed")

    def __call__(self, x: Array, here: Here, parts: Parts) -> Array:
        hidden = ACTIVATIONS[self._activation](product("up", x, self.up, here, parts))
        return product("down", hidden, self.down, here, parts)


class Block(nnx.Module):
    """Pre-norm residual block: x += attention, x += MLP; parts act at their sites."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = Norm(config), Norm(config)
        self.attention = Attention(config, config.windows()[layer], rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.parts = make_parts(config, layer, rngs=rngs)

    def __call__(self, x: Array, query_source: Array, here: Here, view: View = BLIND) -> Array:
        """Stream x [B, T, D], and what queries are taken from [B, T, D] -> stream [B, T, D]."""
        parts, layer = self.parts, here.layer
        with jax.named_scope("attention"):
            query_source, source = self.attention_norm(query_source), self.attention_norm(x)
            source = through(parts, "attention_input", source, here)
            out = self.attention(query_source, source, here, view, parts)
            x = x + view("attention", layer, through(parts, "attention_output", out, here))
        x = through(parts, "attention_sum", x, here)
        x = through(parts, "stream", x, here, place="mlp_stream")
        with jax.named_scope("mlp"):
            out = self.mlp(through(parts, "mlp_input", self.mlp_norm(x), here), here, parts)
            x = x + view("mlp", layer, through(parts, "mlp_output", out, here))
        return view("block", layer, through(parts, "block_output", x, here))
