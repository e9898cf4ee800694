"""Decoding from a cache equals one full forward pass, for every rule, attention, window and K."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.registry import LOOP_RULES
from looped_jax.config.settings import ModelSettings, Settings
from looped_jax.model import loss, transformer
from looped_jax.resolve import resolve
from tests.covering import DISTINCT_RULES, grid

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 12)).astype(np.int32)
PREFILL = 5


def small(variant="FLT", **settings):
    settings = {"layers": 2, "width": 32, "heads": 4, "seq_len": 16, "loops": 3} | settings
    config = ModelSettings(variant=variant, dtype="float32", latent_rank=8, **settings)
    return resolve(Settings(model=config), vocab_size=97).model


def random_weights(config):
    """Louder than fresh ones, so that every loop matters; at 0.3, twelve loops already amplify the
    rounding of float32 to the tolerance, and that is not what is tested."""
    params = transformer.init_params(config, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    return {
        name: 0.25 * jax.random.normal(key, weight.shape)
        for key, (name, weight) in zip(keys, sorted(params.items()), strict=True)
    }


@functools.partial(jax.jit, static_argnums=(0, 3))
def full_logits(config, params, tokens, loop_counts):
    """[N, B, T, V], one per loop count, without a cache."""
    wanted = tuple(k - 1 for k in loop_counts)
    states = transformer.forward(
        config, params, tokens, loops=max(loop_counts), return_loops=wanted
    )
    return loss.logits(config, params, states.hidden)


def cached_logits(config, params, tokens, loops, kind="exact"):
    """Prefill some tokens, then one by one; two compiles in all."""
    batch, length = tokens.shape
    extend = jax.jit(
        functools.partial(transformer.extend, config, loops=loops, kind=kind), donate_argnums=3
    )
    memory = transformer.empty_cache(config, batch=batch, length=length + 3, loops=loops, kind=kind)
    places = np.broadcast_to(np.arange(length), tokens.shape)
    found = []
    for start, end in [(0, PREFILL), *((t, t + 1) for t in range(PREFILL, length))]:
        hidden, memory = extend(params, tokens[:, start:end], places[:, start:end], memory)
        found.append(loss.logits(config, params, hidden))
    assert extend._cache_size() == 2
    return jnp.concatenate(found, axis=1)


ATTENTION = {
    "full": {},
    "grouped": {"kv_heads": 2},
    "mla": {"attention": "mla"},
}


@grid(variant=DISTINCT_RULES, attention=ATTENTION, pattern=("L", "SL"), loops=(1, 2, 3, 12))
def test_decoding_equals_the_full_forward(variant, attention, pattern, loops):
    config = small(variant, window_pattern=pattern, **ATTENTION[attention])
    params = random_weights(config)
    full = full_logits(config, params, TOKENS, (1, 2, 3, 12))[(1, 2, 3, 12).index(loops)]
    cached = cached_logits(config, params, TOKENS, loops)
    np.testing.assert_allclose(cached, full, rtol=0, atol=1e-4)


def test_keeping_only_the_last_loop_drifts_and_is_exact_for_one_loop():
    config = small()
    params = random_weights(config)
    one, full = full_logits(config, params, TOKENS, (1, 3))
    last = cached_logits(config, params, TOKENS, 3, kind="last")
    np.testing.assert_allclose(last[:, :PREFILL], full[:, :PREFILL], atol=1e-4)  # the prefill
    assert np.abs(last - full)[:, PREFILL:].max() > 0.1
    alone = cached_logits(config, params, TOKENS, 1, kind="last")
    np.testing.assert_allclose(alone, one, atol=1e-4)


@pytest.mark.parametrize("variant", LOOP_RULES)
def test_first_layer_is_stored_once_where_all_loops_share_it(variant):
    config = small(variant)
    slots = transformer.empty_cache(config, batch=1, length=8, loops=12)["key"].shape[0]
    assert slots == (24 - 11 if variant in ("FLT", "LT_ia") else 24)
    assert transformer.cache_bytes_per_token(config, 12) == slots * 2 * 32 * 4
    assert transformer.cache_bytes_per_token(config, 12, "last") == 2 * 2 * 32 * 4


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="cache='first' is unknown; choose exact or last"):
        transformer.empty_cache(small(), batch=1, length=8, loops=2, kind="first")
