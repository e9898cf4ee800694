"""Against numbers drawn here, the rules' formulas, and what a start may depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.config.registry import PARTS
from looped_jax.errors import ConfigError
from looped_jax.model import probe, transformer
from tests.model.parts.plain import norm, params_of
from tests.model.test_part import TOKENS, loud, with_parts
from tests.model.test_sampled_loops import counts_of, sampled

SEEDS = np.array([7, 11], np.uint32)


def config_of(kind="normal", scale=1.0, **model):
    config = with_parts((), **model)
    own = PARTS["state_init"].Settings(on=True, kind=kind, scale=scale)
    return dataclasses.replace(config.model, parts=Parts({"state_init": own}))


def start_of(config, params, seeds=None, tokens=TOKENS):
    """The state before the first loop [B, T, D], as a rule that starts from it alone shows it."""
    recorder = probe.Recorder(("start",))
    return transformer.forward(config, params, tokens, probe=recorder, seeds=seeds).seen["start"][0]


@pytest.mark.parametrize(
    ("rule", "start"),
    [
        ("LT_i", lambda p, e, h: norm(e + h)),
        ("gate", lambda p, e, h: norm(h * norm(e))),
        ("linear", lambda p, e, h: h @ p["rule.of_state"] + norm(e) @ p["rule.of_embedding"]),
        (
            "diagonal",
            lambda p, e, h: (
                np.exp(-np.log1p(np.exp(p["rule.step"])) * np.exp(p["rule.log_rate"])) * h
                + np.log1p(np.exp(p["rule.step"])) * (norm(e) @ p["rule.input"])
            ),
        ),
    ],
)
def test_the_first_loop_starts_as_every_other(rule, start):
    config, shown = (config_of(scale=0.5, variant=name, layers=1) for name in (rule, "linear"))
    params = loud(config)
    alone = loud(shown) | {"rule.of_state": np.eye(32), "rule.of_embedding": np.zeros((32, 32))}
    h, e = np.asarray(start_of(shown, alone, SEEDS)), np.asarray(params["embed"])[TOKENS]
    assert 0.4 < h.std() < 0.6
    found = start_of(config, params, SEEDS)
    np.testing.assert_allclose(found, start(jax.device_get(params), e, h), atol=1e-4)


@pytest.mark.parametrize(("kind", "most"), [("normal", np.inf), ("like_init", 3.0)])
def test_what_is_drawn_has_the_moments_that_it_says(kind, most):
    config = config_of(kind, 2.0, variant="linear", layers=1, width=64)
    params = transformer.init_params(config, jax.random.key(0))  # which starts from h alone
    tokens, seeds = np.zeros((32, 12), np.int32), np.arange(32, dtype=np.uint32)
    h = np.asarray(start_of(config, params, seeds, tokens)) / 2
    assert abs(h.mean()) < 0.03 and np.abs(h).max() <= most + 1e-6
    assert np.abs(h).max() > 2.9
    # of a normal distribution cut at c: 1 − 2 c φ(c) / (1 − 2 Φ(−c))
    cut = 1.0 if most == np.inf else 1 - 6 * 0.004432 / 0.9973
    assert h.var() == pytest.approx(cut, abs=0.02)


def test_a_start_depends_on_the_rows_seed_and_the_tokens_position_alone():
    config = config_of(variant="linear", layers=1)
    params = transformer.init_params(config, jax.random.key(0))
    both = start_of(config, params, SEEDS)
    for row in range(2):
        other = start_of(config, params, SEEDS[row : row + 1], TOKENS[:1, :5] * 0)
        np.testing.assert_array_equal(both[row, :5], other[0])
    assert np.unique(np.round(both, 5)).size == both.size  # no two numbers are one
    fixed = start_of(config, params)
    np.testing.assert_array_equal(fixed[0], fixed[1])
    assert np.abs(fixed[0] - both[0]).min() > 0


def test_a_plain_loop_that_starts_from_the_embedding_is_the_plain_loop():
    started, plain = config_of("embedding", variant="LT"), with_parts((), variant="LT").model
    params = loud(plain)
    with jax.disable_jit():  # one operation at a time: two programs are not fused alike
        ours, theirs = (
            transformer.forward(c, params_of(c, params), TOKENS, return_loops=(0, 2)).hidden
            for c in (started, plain)
        )
    np.testing.assert_array_equal(ours, theirs)


def test_gradients_reach_the_embedding_through_the_state_alone():
    """Also where the number of loops is data, and rows begin in different ones."""
    started, plain = config_of("embedding", variant="LT"), with_parts((), variant="LT").model
    params, counts = loud(plain, 0.1), counts_of(3, 3, [3, 1])
    ours, theirs = (
        sampled(c)(params_of(c, params), TOKENS, TOKENS, counts)[0]["embed"]
        for c in (started, plain)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours).max() > 1e-3


def test_zero_is_a_state_too():
    config = config_of("zero", variant="diagonal", layers=1)
    params = transformer.init_params(config, jax.random.key(0))
    step = jnp.log(1 / 0.2**0.5)  # by default a loop keeps √0.2 of the state
    e = norm(np.asarray(params["embed"])[TOKENS])
    np.testing.assert_allclose(start_of(config, params), step * e, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "scale", "variant", "message"),
    [
        ("normal", 1.0, "LT", "kind=normal with model.variant=LT, .* give .*kind=embedding"),
        ("zero", 1.0, "LT", "kind=zero with model.variant=LT"),
        ("zero", 2.0, "FLT", "scale=2.0 of .*kind=zero changes nothing"),
        ("normal", 0.0, "FLT", "scale=0 leaves nothing; give .*kind=zero"),
    ],
)
def test_what_cannot_be_is_refused_by_name(kind, scale, variant, message):
    with pytest.raises(ConfigError, match=message):
        transformer.weights(config_of(kind, scale, variant=variant))
