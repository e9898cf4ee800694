"""Settings of positions, queries, windows, soft cap and starts, against what they say they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.settings import ModelSettings, Settings
from looped_jax.config.transformer_settings import (
    InitSettings,
    QKSettings,
    RopeSettings,
    ShortWindowSettings,
)
from looped_jax.errors import ConfigError
from looped_jax.model import flops, loss, probe, transformer
from looped_jax.model.block import rope_tables, rotate
from looped_jax.model.norm import rms_norm
from looped_jax.resolve import resolve
from tests.model.test_part import TOKENS, check_decoding, check_gradients, loud, with_parts

OTHERS = {
    "window_pattern": "SL",
    "long_window": 9,
    "head_width": 12,  # 4 heads of it are wider than the model
    "rope": RopeSettings(base=100_000.0, dtype="float32"),
    "qk": QKSettings(norm="before_rope", scale=1.2),
    "short_window": ShortWindowSettings(tokens=4, beside_itself=True),
    "soft_cap": 0.0,
}


def model(**settings):
    return resolve(Settings(model=ModelSettings(**settings)), vocab_size=97).model


@pytest.mark.parametrize(
    ("short", "seq_len", "keys"),
    [
        ({}, 1024, 256),
        ({}, 2, 1),
        ({"share": 0.29}, 100, 29),
        ({"share": 0.5, "beside_itself": True}, 21, 11),
        ({"tokens": 7}, 1024, 7),
        ({"multiple": 128}, 2048, 512),
        ({"multiple": 128}, 513, 256),  # 128 · ceil(T / 512)
        ({"tokens": 130, "multiple": 128, "beside_itself": True}, 1024, 257),
    ],
)
def test_keys_in_a_short_window(short, seq_len, keys):
    found = model(
        layers=3, window_pattern="S", seq_len=seq_len, short_window=ShortWindowSettings(**short)
    )
    assert found.windows() == (keys, keys, None)


def test_layers_of_l_see_a_long_window_of_longer_rows():
    config = with_parts((), variant="LT", layers=2, seq_len=6, window_pattern="L").model
    params = loud(config)
    found, everything = (
        transformer.forward(c, params, TOKENS).hidden[0]
        for c in (dataclasses.replace(config, long_window=7), config)
    )
    np.testing.assert_allclose(found[:, :7], everything[:, :7], atol=1e-5)
    assert np.abs(found - everything)[:, 7:].max() > 1e-2


def test_rope_has_its_base_and_rounding():
    exact = RopeSettings(base=100_000.0, dtype="float32")
    cos, sin = rope_tables(jnp.array([3]), 8, jnp.float32, exact)
    angle = 3 * 100_000.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(cos[0, 0], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin(angle), atol=1e-6)
    rounded, _ = rope_tables(jnp.array([3]), 8, jnp.float32, RopeSettings(base=100_000.0))
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, cos.astype(jnp.bfloat16))


@pytest.mark.parametrize("norm", ["after_rope", "before_rope", "none"])
def test_queries_and_keys_are_normed_and_scaled(norm):
    config = dataclasses.replace(
        with_parts((), layers=1, loops=1).model, qk=QKSettings(norm=norm, scale=1.2)
    )
    params = loud(config)
    seen = transformer.forward(
        config, params, TOKENS, probe=probe.Recorder(("query", "key"))
    ).seen  # fmt: skip
    x = rms_norm(rms_norm(params["embed"][TOKENS]))
    rope = rope_tables(jnp.arange(12), 8, jnp.float32)
    for name in ("query", "key"):
        heads = (x @ params[f"blocks.0.attention.{name}"]).reshape(2, 12, -1, 8)
        heads = rms_norm(heads) if norm == "before_rope" else heads
        heads = rotate(heads, rope)
        heads = rms_norm(heads) if norm == "after_rope" else heads
        np.testing.assert_allclose(seen[name][0, 0], 1.2 * heads, atol=1e-5)


@pytest.mark.parametrize("cap", [0.0, 7.0])
def test_logits_are_capped_or_not(cap):
    config = dataclasses.replace(with_parts((), layers=1, loops=1).model, soft_cap=cap)
    params = loud(config, 2.0)
    hidden = transformer.forward(config, params, TOKENS).hidden
    z = (hidden @ params["head"])[..., :97]
    assert np.abs(z).max() > 15
    expected = 7 * np.tanh(z / 7) if cap else z
    np.testing.assert_allclose(loss.logits(config, params, hidden), expected, rtol=1e-5, atol=1e-4)


def test_heads_may_have_a_width_of_their_own():
    config = with_parts((), head_width=12).model
    weights = transformer.weights(config)
    assert weights["blocks.0.attention.query"].shape == (32, 48)
    assert weights["blocks.0.attention.key"].shape == (32, 24)
    assert weights["blocks.0.attention.out"].shape == (48, 32)
    plain = with_parts((), head_width=8).model  # 4 heads of 8, as by default
    assert transformer.weights(plain) == transformer.weights(with_parts(()).model)
    more = 2 * 2 * (12 - 8) * (4 + 2) * 32 + 2 * 2 * (12 - 8) * 4 * config.seq_len
    assert flops.loop(config) - flops.loop(plain) == 2 * more


def test_sizes_follow_from_the_depth_in_whole_heads():
    deep = model(layers=5, head_width=128)
    assert (deep.width, deep.heads, deep.head_dim) == (384, 3, 128)  # 320, rounded up
    assert model(layers=5, width_per_layer=32).width == 160
    assert model(layers=4, width=64, heads=3, head_width=32).attention_width == 96


@pytest.mark.parametrize("variant", ["FLT", pytest.param("LT", marks=pytest.mark.slow)])
def test_with_all_of_them_decoding_is_exact(variant):
    check_decoding(with_parts((), variant=variant, **OTHERS).model)


def test_with_all_of_them_meshes_change_nothing():
    check_gradients(with_parts((), **OTHERS))


def test_weights_start_as_told():
    init = InitSettings(embedding_std=0.8, head_std=0.01, up_scale=0.4, out_std=0.02)
    params = transformer.init_params(
        model(layers=2, width=64, heads=2, init=init), jax.random.key(0)
    )
    bound = (3 / 64) ** 0.5
    np.testing.assert_allclose(params["embed"].std(), 0.8, rtol=0.03)
    np.testing.assert_allclose(params["head"].std(), 0.01, rtol=0.03)
    for name, factor in (("mlp.up", 0.4), ("attention.query", 1.0)):
        assert 0.98 * factor * bound < np.abs(params[f"blocks.1.{name}"]).max() <= factor * bound
    for name in ("attention.out", "mlp.down"):
        np.testing.assert_allclose(params[f"blocks.1.{name}"].std(), 0.02, rtol=0.05)
    for embedding, std in (("tied", 0.02), ("factorised", 1.0)):
        own = transformer.init_params(
            model(layers=1, width=64, heads=2, embedding=embedding), jax.random.key(0)
        )
        np.testing.assert_allclose(own.get("embed", own.get("embed.table")).std(), std, rtol=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_width": 7}, "model.head_width=7 is odd, and rotary positions pair channels"),
        ({"head_width": 64, "width": 100}, "model.head_width=64 does not divide model.width=100"),
        ({"head_width": 64, "width": 128, "kv_heads": 3}, "model.kv_heads=3 does not divide"),
        ({"heads": 5}, "choose 2, 3, 4 or 6; or give model.head_width"),
    ],
)
def test_impossible_heads_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        model(**settings)
    with pytest.raises(ConfigError, match="model.qk.norm='both' is unknown; choose after_rope"):
        Settings.from_dict({"model": {"qk": {"norm": "both"}}})
