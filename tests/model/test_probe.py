"""What the windows show equals what an unrolled loop, written out here, computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.registry import LOOP_RULES
from looped_jax.config.settings import (
    MeshConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
)
from looped_jax.model import probe, transformer
from looped_jax.model.attention_kernels import plain
from looped_jax.model.block import rope_tables
from looped_jax.model.full_pass import FullPass
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.base import Here
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import optimizers, train_step
from tests.covering import DISTINCT_RULES

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 8, 9)).astype(np.int32)


def make_config(**model):
    sizes = {"layers": 2, "loops": 3, "width": 32, "heads": 4, "kv_heads": 2, "seq_len": 8}
    model = ModelSettings(dtype="float32", window_pattern="SL", **sizes | model)
    optimizer = OptimConfig(newton_schulz_dtype="float32")
    return resolve(
        Settings(model=model, optim=optimizer, train=TrainSettings(steps=5)), vocab_size=61
    )


def loud_params(config):
    """Fresh output projections are zero and would hide the loop."""
    params = transformer.init_params(config.model, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(params)))
    return {n: w + 0.2 * jax.random.normal(next(keys), w.shape) for n, w in params.items()}


def unrolled(config, params, tokens, added):
    """Mean token loss with `added` [K, L, 3, B, T, D] put onto every output, and the streams."""
    model = transformer.bind(config.model, params)
    rule, inputs = model.rule, tokens[:, :-1]
    e = params["embed"][inputs]
    rope = rope_tables(jnp.arange(inputs.shape[1]), config.model.head_dim, jnp.float32)
    h, streams = jnp.zeros_like(e), []
    for k in range(config.model.loops):
        here = Here(inputs, e, h, jnp.asarray(k), jnp.asarray(k == 0), rope=rope)
        here = here._replace(history=FullPass(plain))
        x = rule.start(here)
        for layer, block in enumerate(model.blocks):
            here = here._replace(layer=layer)
            x, query_source = rule.inject(x, here)
            sources = rms_norm(query_source), rms_norm(x)
            mixed = block.attention(*sources, here, probe.BLIND, {})
            x = x + mixed + added[k, layer, 0]
            x = x + block.mlp(rms_norm(x), here, {}) + added[k, layer, 1] + added[k, layer, 2]
            streams.append(x)
        h = rms_norm(x)
    logits = 15 * jnp.tanh(h @ params["head"] / 15)[..., : config.model.vocab_size]
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean(), jnp.stack(streams)


@pytest.mark.parametrize("variant", DISTINCT_RULES)
def test_taps_and_stream_norms_equal_an_unrolled_loop(variant):
    config = make_config(variant=variant)
    params, mesh = loud_params(config), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    watched = functools.partial(train_step.gradients, config, mesh, diagnostics=True)
    _, metrics = jax.jit(watched)(params, TOKENS[:1])
    m = config.model
    added = jnp.zeros((m.loops, m.layers, 3, *TOKENS[0, :, 1:].shape, m.width))
    written_out = functools.partial(unrolled, config, params, TOKENS[0])
    gradient, streams = jax.jit(jax.grad(written_out, has_aux=True))(added)
    wanted = jnp.sqrt(jnp.sum(gradient**2, axis=(3, 4, 5)))
    for index, name in enumerate(probe.TAPS):
        found = metrics["diagnostics"][f"gradient_{name}"]
        assert found.min() > 0
        np.testing.assert_allclose(found, wanted[..., index], rtol=1e-4)
    norms = jnp.linalg.norm(streams, axis=-1).mean((1, 2)).reshape(m.loops, m.layers)
    np.testing.assert_allclose(metrics["diagnostics"]["residual_norm"], norms, rtol=1e-5)


@pytest.mark.parametrize(
    "variant", ["FLT", *(pytest.param(n, marks=pytest.mark.slow) for n in LOOP_RULES if n != "FLT")]
)
def test_watching_changes_no_gradient(variant):
    config, mesh = make_config(variant=variant), sharding.one_device()
    watched, plain = (
        jax.jit(functools.partial(train_step.gradients, config, mesh, diagnostics=each))(
            loud_params(config), TOKENS[:1]
        )[0]
        for each in (True, False)
    )
    for name in plain:
        np.testing.assert_allclose(watched[name], plain[name], atol=1e-6, err_msg=name)


def test_taps_equal_finite_differences():
    config = make_config(loops=2, layers=1)
    params = loud_params(config)
    added = jnp.zeros((2, 1, 3, *TOKENS[0, :, 1:].shape, config.model.width))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    _, metrics = jax.jit(functools.partial(train_step.gradients, config, mesh, diagnostics=True))(
        params, TOKENS[:1]
    )
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), params)
        value = jax.jit(lambda a: unrolled(config, wide, TOKENS[0], a)[0])
        gradient = jax.grad(value)(jnp.asarray(added, jnp.float64))
        direction = gradient / jnp.linalg.norm(gradient[0, 0, 1])
        only = jnp.zeros_like(direction).at[0, 0, 1].set(direction[0, 0, 1])
        slope = (value(1e-2 * only) - value(-1e-2 * only)) / 2e-2  # attention stays float32
    # along the gradient itself the slope is its norm
    np.testing.assert_allclose(metrics["diagnostics"]["gradient_mlp"][0, 0], slope, rtol=1e-3)


@functools.cache
def signals(sizes, micro_batches):
    """Of one step on a mesh."""
    config, tokens = make_config(), TOKENS.reshape(micro_batches, -1, 9)
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    optimizer = optimizers.make_optimizer(config, mesh, steps=5)
    step = train_step.make_train_step(config, optimizer, mesh, diagnostics=True)
    fresh = train_step.create(config, optimizer, mesh)
    params = jax.device_put(loud_params(config), transformer.shardings(config.model, mesh))
    fresh = dataclasses.replace(fresh, params=params)
    return jax.device_get(step(fresh, tokens)[1]["diagnostics"])


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 2)])
def test_signals_do_not_depend_on_mesh_or_micro_batches(sizes):
    one, many = signals((1, 1, 1), micro_batches=1), signals(sizes, micro_batches=2)
    assert one.keys() == many.keys() and len(one) == 7
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(many), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, err_msg=str(path))


@pytest.mark.parametrize("attention", ["full", "mla"])
def test_a_trace_holds_the_states_of_the_forward_pass(attention):
    kv_heads = 4 if attention == "mla" else 2
    config = make_config(attention=attention, kv_heads=kv_heads, latent_rank=8)
    params, inputs = loud_params(config), TOKENS[0, :, :-1]
    recorder = probe.Recorder(probe.NAMES)
    run = functools.partial(transformer.forward, config.model, probe=recorder)
    seen = jax.jit(run)(params, inputs).seen
    states = transformer.forward(config.model, params, inputs, return_loops=(0, 1, 2))
    np.testing.assert_allclose(seen["state"], states.hidden, atol=1e-5)
    norms = jnp.linalg.norm(seen["block"][:, -1], axis=-1).mean((1, 2))
    np.testing.assert_allclose(norms, states.norms, rtol=1e-5)
    weights = seen["weights"]
    assert weights.shape == (3, 2, 8, 4, 8, 8)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not np.triu(weights, 1).any()
    assert not np.tril(weights[:, 0], -2).any()  # a window of 2 in the first layer
    assert seen.keys() == set(probe.NAMES) and seen["query"].shape == (3, 2, 8, 8, 4, 8)
