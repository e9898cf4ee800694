"""Fused attention equals the plain one, forward and backward, or is refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config import ConfigError, ModelConfig
from looped_jax.model import kernels

MODEL = ModelConfig(width=256, heads=2, kv_heads=1, seq_len=256, vocab_size=64)


def arguments(dtype, *, heads=2, kv_heads=1):
    shapes = [(1, 256, n, 128) for n in (heads, kv_heads, kv_heads)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def value_and_gradients(kernel, arrays, window):
    def total(*arrays):
        mixed = kernels.attend(kernel, *arrays, window)
        weights = jnp.cos(jnp.arange(mixed.size, dtype=jnp.float32)).reshape(mixed.shape)
        return jnp.sum(mixed.astype(jnp.float32) * weights), mixed

    grads, mixed = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [mixed, *grads]


@pytest.mark.parametrize("window", [None, 1, 48, 700])
@pytest.mark.parametrize("time", [5, 255, 777])
def test_parts_of_plain_attention_equal_the_library(window, time):
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(k, (2, time, n, 8)) for k, n in zip(keys, (6, 2, 2), strict=True)]

    def library(*arrays):
        before = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(*arrays, is_causal=True, local_window_size=before)

    ours = kernels.attend("xla", *arrays, window)
    np.testing.assert_allclose(ours, library(*arrays), atol=1e-5)


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_splash_kernel_equals_plain_attention(window, kv_heads):
    arrays = arguments("float32", kv_heads=kv_heads)
    plain, fused = (value_and_gradients(k, arrays, window) for k in ("xla", "splash"))
    for a, b in zip(plain, fused, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_cudnn_equals_plain_attention(window, kv_heads):
    arrays = arguments("bfloat16", kv_heads=kv_heads)
    exact = value_and_gradients("xla", [a.astype("float32") for a in arrays], window)
    plain, fused = (value_and_gradients(k, arrays, window) for k in ("xla", "cudnn"))
    for a, b, c in zip(exact, plain, fused, strict=True):
        rounding = float(jnp.abs(a - b.astype("float32")).max())
        assert float(jnp.abs(a - c.astype("float32")).max()) < 2 * rounding


@pytest.mark.parametrize(
    ("changes", "surroundings", "kernel"),
    [
        ({}, {"platform": "cpu"}, "xla"),
        ({}, {"platform": "gpu"}, "cudnn"),
        ({"dtype": "float32"}, {"platform": "gpu"}, "xla"),
        ({}, {"platform": "tpu"}, "splash"),
        ({"heads": 4}, {"platform": "tpu"}, "xla"),
        ({}, {"platform": "tpu", "time": 250}, "xla"),
        ({}, {"platform": "tpu", "tensor": 2}, "xla"),
        ({"kernel": "xla"}, {"platform": "gpu"}, "xla"),
    ],
)
def test_each_platform_gets_its_kernel_where_it_fits(changes, surroundings, kernel):
    config = dataclasses.replace(MODEL, **changes)
    assert kernels.choose(config, **{"time": 256, **surroundings}) == kernel


@pytest.mark.parametrize(
    ("changes", "surroundings", "message"),
    [
        ({"kernel": "cudnn"}, {"platform": "cpu"}, "cudnn needs an NVIDIA GPU, this is cpu"),
        ({"kernel": "cudnn", "dtype": "float32"}, {"platform": "gpu"}, "model.dtype=bfloat16"),
        ({"kernel": "cudnn", "heads": 1}, {"platform": "gpu"}, "not 256; change model.heads"),
        ({"kernel": "splash"}, {"time": 100}, "rows of 100 tokens and heads of 128"),
        ({"kernel": "splash"}, {"tensor": 4}, "mesh.tensor=4; set mesh.tensor=1"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused_by_name(changes, surroundings, message):
    config = dataclasses.replace(MODEL, **changes)
    with pytest.raises(ConfigError, match=message):
        kernels.choose(config, **{"time": 256, **surroundings})
