"""How a later loop starts under each injection, against the formula, written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.options import Rules
from looped_jax.model import probe, transformer
from looped_jax.model.loop_rules.linear import LinearSettings
from tests.model.parts.plain import norm
from tests.model.test_part import TOKENS, loud, with_parts


def gate(params, h, e):
    return norm(h * e)


def linear(params, h, e):
    return h @ params["rule.of_state"] + e @ params["rule.of_embedding"]


def diagonal(params, h, e):
    step = np.log1p(np.exp(params["rule.step"]))
    decay = np.exp(-step * np.exp(params["rule.log_rate"]))
    return decay * h + step * (e @ params["rule.input"])


@pytest.mark.parametrize("formula", [gate, linear, diagonal])
def test_a_later_loop_starts_from_state_and_embedding(formula):
    config = with_parts((), layers=1, variant=formula.__name__).model
    params = loud(config)
    recorder = probe.Recorder(("start", "state"))
    seen = transformer.forward(config, params, TOKENS, probe=recorder).seen
    e = norm(params["embed"][TOKENS])
    np.testing.assert_allclose(seen["start"][0], e, atol=1e-5)
    for loop in (1, 2):
        start = formula(params, seen["state"][loop - 1], e)
        np.testing.assert_allclose(seen["start"][loop], start, atol=1e-4)


@pytest.mark.parametrize("settings", [LinearSettings(), LinearSettings(0.5, 2.0)])
def test_linear_starts_as_the_multiples_that_it_is_told(settings):
    config = with_parts((), layers=1, variant="linear").model
    config = dataclasses.replace(config, rules=Rules({"linear": settings}))
    params = transformer.init_params(config, jax.random.key(0))
    recorder = probe.Recorder(("start", "state"))
    seen = transformer.forward(config, params, TOKENS, probe=recorder).seen
    e = norm(params["embed"][TOKENS])
    mixed = settings.state * seen["state"][0] + settings.embedding * e
    np.testing.assert_allclose(seen["start"][1], mixed, atol=1e-5)


def test_the_diagonal_decays_as_it_is_told_at_first_and_always_below_one():
    config = with_parts((), layers=1, variant="diagonal").model
    params = transformer.init_params(config, jax.random.key(0))
    np.testing.assert_allclose(diagonal(params, 1.0, 0 * params["rule.input"]), 0.2**0.5, rtol=1e-5)
    for extreme in (-8.0, 0.0, 8.0):
        changed = params | {
            name: jnp.full_like(params[name], extreme) for name in ("rule.step", "rule.log_rate")
        }
        changed["rule.input"] = jnp.zeros_like(params["rule.input"])
        recorder = probe.Recorder(("start", "state"))
        seen = transformer.forward(config, changed, TOKENS, probe=recorder).seen
        for loop in (1, 2):
            before = np.abs(seen["state"][loop - 1])
            assert (np.abs(seen["start"][loop]) < before + (before == 0)).all()
