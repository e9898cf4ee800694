"""The model's product: float32 gradients of bfloat16 computation, one cast for all loops."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.settings import MeshConfig, ModelSettings, Settings
from looped_jax.model import transformer
from looped_jax.model.linear import from_heads, linear, to_heads
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import train_step

TOKENS = np.random.default_rng(0).integers(0, 64, (1, 4, 17)).astype(np.int32)
MODEL = ModelSettings(
    layers=1, loops=6, width=96, heads=2, seq_len=16, dtype="bfloat16", variant="LT"
)  # fmt: skip
CONFIG = resolve(Settings(model=MODEL), vocab_size=64)


def gradients(config):
    params = transformer.init_params(config.model, jax.random.key(0))
    noise = jax.random.split(jax.random.key(1), len(params))
    params = {
        n: w + 0.1 * jax.random.normal(k, w.shape)
        for (n, w), k in zip(params.items(), noise, strict=True)
    }
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    program = jax.jit(functools.partial(train_step.gradients, config, mesh))
    return program.lower(params, TOKENS).compile(), params


def test_gradients_equal_those_of_a_plain_product():
    x, w = jax.random.normal(jax.random.key(0), (2, 3, 5)), jnp.arange(20.0).reshape(5, 4)
    weights = jnp.cos(jnp.arange(24.0)).reshape(2, 3, 4)
    ours = jax.grad(lambda x, w: jnp.sum(linear(x, w) * weights), argnums=(0, 1))(x, w)
    plain = jax.grad(lambda x, w: jnp.sum((x @ w) * weights), argnums=(0, 1))(x, w)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


PRODUCTS = {  # of [2, 24, in] and a weight, narrower, wider and between heads
    "down": (linear, (2, 24, 32), (32, 8)),
    "up": (linear, (2, 24, 8), (8, 32)),
    "to heads": (lambda x, w: to_heads(x, w, 2), (2, 24, 8), (8, 12)),
    "to few heads": (lambda x, w: to_heads(x, w, 1), (2, 24, 8), (8, 4)),
    "from heads": (from_heads, (2, 24, 2, 4), (8, 12)),
    "from wide heads": (from_heads, (2, 24, 2, 16), (32, 8)),
}


@pytest.mark.parametrize("product, of_x, of_weight", PRODUCTS.values(), ids=PRODUCTS)
def test_gradients_of_weights_on_a_cpu_transpose_the_narrower_side(product, of_x, of_weight):
    """With the wider one transposed the product takes up to 1.6 times as long."""
    x, w = (
        jax.random.normal(jax.random.key(0), of_x),
        jax.random.normal(jax.random.key(1), of_weight),
    )

    @jax.jit
    def gradient(x, w):
        return jax.grad(lambda w: jnp.sum(jnp.sin(product(x, w))))(w)

    rows = np.float64(x).reshape(48, -1)
    expected = rows.T @ np.cos(rows @ np.float64(w))
    np.testing.assert_allclose(gradient(x, w), expected, rtol=1e-4, atol=1e-5)
    traced = gradient.trace(x, w)
    narrow, wide = sorted(expected.shape)
    here = traced.lower().compile().as_text()
    assert f"f32[{narrow},48]" in here and f"f32[{wide},48]" not in here
    for elsewhere in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(elsewhere,)).as_text()
        assert "dot_general" in text and "optimization_barrier" not in text


def test_logits_of_bfloat16_states_keep_float32_and_send_bfloat16_back():
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.full((8, 3), 1.001)
    assert linear(x, w, "float32").dtype == jnp.float32
    text = jax.jit(jax.grad(lambda x: linear(x, w, "float32").sum())).lower(x).as_text()
    assert re.search(r"dot_general .*tensor<4x3xbf16>, tensor<8x3xbf16>", text)


def test_weights_are_cast_before_the_loops_and_not_in_them():
    program, _ = gradients(CONFIG)
    text = program.as_text()
    computations = {
        re.match(r"(?:ENTRY )?%?([^\s(]+)", part).group(1): part
        for part in re.split(r"\n(?=%|ENTRY)", text)
    }
    casts = [
        name for name, part in computations.items()
        if re.search(r"= bf16\[96,384\]\S* convert\(", part)
    ]  # fmt: skip
    bodies = set(re.findall(r"body=%([^\s,]+)", text))
    assert casts and bodies  # fusions that cast an MLP's weights, and the loops
    for name in bodies:
        calls = set(re.findall(r"calls=%([^\s,]+)", computations[name]))
        assert name not in casts and not calls & set(casts)


@pytest.fixture(scope="module")
def rounded_and_exact():
    """Gradients of the same weights, computed in bfloat16 and in float32."""
    found = []
    for dtype in ("bfloat16", "float32"):
        model = dataclasses.replace(CONFIG.model, dtype=dtype)
        program, params = gradients(dataclasses.replace(CONFIG, model=model))
        found.append(program(params, TOKENS)[0])
    return found


@pytest.mark.parametrize("name", ["blocks.0.mlp.up", "blocks.0.attention.query", "embed", "head"])
def test_loops_are_summed_in_float32(rounded_and_exact, name):
    """Rounding each of K gradients once costs no more than computing in bfloat16 does anyway."""
    grads, reference = (grads[name] for grads in rounded_and_exact)
    assert grads.dtype == jnp.float32
    error = jnp.linalg.norm(grads - reference) / jnp.linalg.norm(reference)
    assert error < 0.05
    # a sum kept in bfloat16 would hold only 8 bits of every entry; a token seen once does too
    kept = np.asarray(grads)[np.asarray(grads) != 0]
    assert np.mean(kept != kept.astype(jnp.bfloat16).astype(np.float32)) > 0.1


def test_products_with_heads_are_products_reshaped_and_so_are_their_gradients():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 3, 8))
    into, out = (jax.random.normal(key, (8, 8)) for key in keys[1:])

    def with_heads(x, into, out):
        return from_heads(jnp.sin(to_heads(x, into, 2)), out).sum()

    def flat(x, into, out):
        return (jnp.sin(x @ into) @ out).sum()

    assert to_heads(x, into, 2).shape == (2, 3, 2, 4)
    for ours, plain in zip(*(jax.grad(f, (0, 1, 2))(x, into, out) for f in (with_heads, flat)),
                           strict=True):  # fmt: skip
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
