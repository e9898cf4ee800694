"""nanochat's own model, and loops of it, against its numbers. See golden/README.md."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from looped_jax.config.settings import Settings
from looped_jax.config.transformer_settings import RopeSettings
from looped_jax.model import transformer
from looped_jax.resolve import resolve
from tests.golden_cases import FOLDER
from tests.model.test_transformer import logits_at, objective
from torch_ref import nanochat_names

CASES = ("gpt_seed_a", "gpt_seed_b", "gpt_head_a")


def load(name):
    """The case's arrays, its parameters and gradients under nanochat's names."""
    with np.load(FOLDER / "nanochat" / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    params, grads = (
        {k.removeprefix(kind): v for k, v in arrays.items() if k.startswith(kind)}
        for kind in ("param/", "grad/")
    )
    return arrays, params, grads


def model(arrays, params, **settings):
    own = nanochat_names.model_settings(
        json.loads(str(arrays["config"])), nanochat_names.release_of(params), dtype="float32",
        **settings,
    )  # fmt: skip
    return resolve(Settings(model=own)).model


def relative(found, golden):
    return np.linalg.norm(found - golden) / np.linalg.norm(golden)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, targets):
    (value, (_, nats, _)), grads = jax.value_and_grad(
        lambda p: objective(config, p, tokens, targets), has_aux=True
    )(params)
    return value, nats[0], grads


@pytest.mark.parametrize("name", CASES)
def test_logits_losses_and_gradients(name):
    arrays, params, grads = load(name)
    config = model(arrays, params)
    ours = nanochat_names.from_nanochat(params)
    assert {n: w.shape for n, w in ours.items()} == {
        n: w.shape for n, w in transformer.weights(config).items()
    }
    logits = logits_at(config, ours, arrays["idx"], (1,))[0]
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=2e-5)
    value, nats, found = run(config, ours, arrays["idx"], arrays["targets"])
    np.testing.assert_allclose(value, arrays["loss"], rtol=0, atol=1e-5)
    of_tokens = arrays["loss_per_token"].reshape(nats.shape)
    np.testing.assert_allclose(nats, of_tokens, rtol=0, atol=2e-5)
    for tensor, golden in nanochat_names.from_nanochat(grads).items():
        assert relative(found[tensor], golden) < 1e-4, tensor


@pytest.mark.parametrize("name", CASES)
def test_windows_and_angles_are_those_of_the_release(name):
    arrays, params, _ = load(name)
    config = model(arrays, params)
    time = arrays["idx"].shape[1]
    keys = [min(window or time, time) for window in config.windows()]
    assert keys == [min(left + 1, time) for left in arrays["window_left"]]
    if name == "gpt_seed_a":
        exact = dataclasses.replace(config, rope=RopeSettings(dtype="float32"))
        logits = logits_at(exact, nanochat_names.from_nanochat(params), arrays["idx"], (1,))[0]
        np.testing.assert_allclose(logits, arrays["logits_fp32rope"], rtol=0, atol=2e-5)
        assert np.abs(logits - arrays["logits"]).max() > 1e-4


@pytest.mark.parametrize("mode", nanochat_names.LOOPS)
def test_loops_of_it(mode):
    arrays, params, _ = load("gpt_seed_a")
    loops = {
        key.removeprefix(f"{mode}."): value
        for key, value in load("loop_a")[0].items()
        if key.startswith(f"{mode}.")
    }
    ours = nanochat_names.from_nanochat(params)
    logits = logits_at(
        model(arrays, params, loops=3, mode=mode), ours, arrays["idx"], (1, 2, 3)
    )  # fmt: skip
    for n, found in enumerate(logits, start=1):
        np.testing.assert_allclose(found, loops[f"K{n}.logits"], rtol=0, atol=5e-5)
    twice = model(arrays, params, loops=2, mode=mode)
    value, _, found = run(twice, ours, arrays["idx"], arrays["targets"])
    np.testing.assert_allclose(value, loops["K2.loss"], rtol=0, atol=1e-5)
    theirs = nanochat_names.to_nanochat({n: np.asarray(g) for n, g in found.items()})
    norms = json.loads(str(loops["K2.gradnorm_names"]))
    assert sorted(norms) == sorted(theirs)
    for name, norm in zip(norms, loops["K2.gradnorms"], strict=True):
        np.testing.assert_allclose(np.linalg.norm(theirs[name]), norm, rtol=1e-4, err_msg=name)
    for name in ("resid_lambdas", "x0_lambdas"):
        assert relative(theirs[name], loops[f"K2.grad.{name}"]) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_weights_go_back_as_they_came(name):
    _, params, _ = load(name)
    back = nanochat_names.to_nanochat(nanochat_names.from_nanochat(params))
    assert back.keys() == params.keys()
    for tensor, array in params.items():
        np.testing.assert_array_equal(back[tensor], array)


def test_what_has_no_counterpart_is_refused():
    with pytest.raises(KeyError, match="blocks.{}.parts.kv_shift"):
        nanochat_names.to_nanochat({"blocks.0.parts.kv_shift.of_key": np.zeros(2)})
    with pytest.raises(KeyError, match="transformer.h.{}.attn.c_kv_down"):
        nanochat_names.from_nanochat({"transformer.h.0.attn.c_kv_down.weight": np.zeros((2, 2))})
    scalars = {"parts.residual_scalars.input": np.zeros((3, 2))}
    with pytest.raises(ValueError, match="has 3 sets, one for each loop; nanochat has 1"):
        nanochat_names.to_nanochat(scalars)
