"""Objectives: which loops they read, a target for each loop, and one of one's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.registry import OBJECTIVES
from looped_jax.config.settings import ModelSettings, Settings, TrainSettings
from looped_jax.errors import ArgumentError
from looped_jax.model import loss, objectives, transformer
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import train_step
from tests import OLDER_FUSIONS
from tests.model.test_kv_cache import random_weights

ROWS = np.random.default_rng(0).integers(0, 97, (2, 4, 10)).astype(np.int32)


def config_of(loss, loops=3):
    sizes = {"layers": 1, "loops": loops, "width": 32, "heads": 2, "seq_len": 9}
    return resolve(
        Settings(
            model=ModelSettings(dtype="float32", loss=loss, **sizes), train=TrainSettings(steps=4)
        ),
        vocab_size=97,
    )


def gradients(config, batch, mesh=None, **compiler_options):
    params = random_weights(config.model)
    mesh = mesh or sharding.one_device()
    program = functools.partial(train_step.gradients, config, mesh)
    return jax.jit(program, compiler_options=compiler_options)(params, batch)


@pytest.mark.parametrize("name", ["END", "FEW", "STEP"])
def test_text_is_a_batch_whose_targets_are_shared_by_all_loops(name):
    config, separate = config_of(name), {"inputs": ROWS[..., :-1], "targets": ROWS[..., 1:]}
    # To the last bit with what users compile with; with QUICK, cutting rows moves a rounding.
    as_users = {"xla_cpu_use_fusion_emitters": True} if OLDER_FUSIONS else {}
    (grads, metrics), (same, other) = (
        gradients(config, batch, **as_users) for batch in (ROWS, separate)
    )
    assert metrics["loss"] == other["loss"]
    for weight in grads:
        np.testing.assert_array_equal(grads[weight], same[weight])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 1), (2, 1, 2)])
def test_every_loop_can_owe_a_target_of_its_own(sizes):
    config = config_of("STEP")
    owed = np.random.default_rng(1).integers(-1, 97, (2, 4, 3, 9)).astype(np.int32)  # M, B, N, T
    owed[..., 0] = -1  # a first token that is not counted, in any loop
    owed = np.where(owed[:, :, -1:] < 0, -1, np.maximum(owed, 0))  # as many in every loop
    mesh = sharding.make_mesh(
        sharding.parse_mesh("data={},fsdp={},tensor={}".format(*sizes)),
        jax.devices()[: int(np.prod(sizes))],
    )
    _, metrics = gradients(config, {"inputs": ROWS[..., :-1], "targets": owed}, mesh)
    params, nats = random_weights(config.model), 0
    for rows, targets in zip(ROWS, owed, strict=True):
        hidden = transformer.forward(
            config.model, params, rows[:, :-1], return_loops=(0, 1, 2)
        ).hidden
        logits = loss.logits(config.model, params, hidden)
        y = np.moveaxis(targets, 1, 0)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), np.maximum(y, 0)[..., None], -1)
        nats = nats - np.where(y < 0, 0, picked[..., 0]).sum((1, 2))
    counted = (owed[:, :, -1] >= 0).sum()
    np.testing.assert_allclose(metrics["loop_losses"], nats / counted, rtol=1e-5)
    np.testing.assert_allclose(metrics["objective"], nats.mean() / counted, rtol=1e-5)


def test_chunks_change_no_loss_of_own_targets():
    config = config_of("STEP").model
    hidden = jax.random.normal(jax.random.key(0), (3, 4, 9, 32))
    targets = np.random.default_rng(2).integers(-1, 97, (3, 4, 9)).astype(np.int32)
    params = random_weights(config)
    whole, parts = (
        loss.token_losses(dataclasses.replace(config, loss_chunk=n), params, hidden, targets)
        for n in (None, 7)
    )
    np.testing.assert_allclose(whole, parts, atol=1e-5)


def test_one_of_ones_own_is_a_setting():
    @OBJECTIVES.register("late")
    class Late(objectives.Step):
        """Later loops count more."""

        def total(self, config, nats):
            share = jnp.arange(1, len(nats) + 1)
            return (nats * share / share.sum()).sum()

    try:
        config = config_of("late")
        assert config.model.scored_loops() == (0, 1, 2)
        late, step = (gradients(config_of(name), ROWS)[0] for name in ("late", "STEP"))
        assert np.abs(late["head"] - step["head"]).max() > 1e-4
    finally:
        del OBJECTIVES._found["late"]


@pytest.mark.parametrize("cap", [0.0, 15.0, 200.0])
@pytest.mark.parametrize("chunk", [None, 7])
def test_losses_weighted_beforehand_have_the_gradients_of_those_weighted_after(chunk, cap):
    config = dataclasses.replace(config_of("STEP").model, loss_chunk=chunk, soft_cap=cap)
    hidden = jax.random.normal(jax.random.key(0), (3, 4, 9, 32))
    targets = np.random.default_rng(2).integers(-1, 97, (4, 9)).astype(np.int32)
    weights, params = jnp.array([0.2, 0.0, 1.5]), random_weights(config)

    def after(params, hidden):
        sums = loss.token_losses(config, params, hidden, targets).sum((1, 2))
        return weights @ sums, sums

    def beforehand(params, hidden):
        return loss.weighted_losses(config, params, hidden, targets, weights)

    found, wanted = (
        jax.value_and_grad(lambda p, h, f=f: jax.tree.map(lambda x: 3 * x, f(p, h)),
                           argnums=(0, 1), has_aux=True)(params, hidden)
        for f in (beforehand, after)
    )  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, wanted)


def test_logits_far_below_a_wide_cap_keep_their_loss():
    config = dataclasses.replace(config_of("END").model, soft_cap=200.0)
    params = {name: jnp.zeros_like(w) for name, w in random_weights(config).items()}
    hidden, targets = jnp.ones((1, 1, 9, 32)), np.zeros((1, 9), np.int32)
    found = loss.token_losses(config, params, hidden, targets)
    np.testing.assert_allclose(found, np.log(97), rtol=1e-6)


@pytest.mark.parametrize(
    "total",
    [
        lambda nats: jnp.square(nats).sum(),
        lambda nats: (jax.lax.stop_gradient(nats) * nats).sum(),
        lambda nats: (jax.nn.softmax(nats) * nats).sum(),
        lambda nats: jnp.where(nats > 1, nats, 0).sum(),
        lambda nats: nats.mean() + 1,
        lambda nats: nats[0] / nats[1],
    ],
)
def test_a_total_that_is_not_linear_is_refused(total):
    class Own(objectives.Step):
        def total(self, config, nats):
            return total(nats)

    with pytest.raises(ArgumentError, match="total of objective STEP is not linear .* override"):
        Own().weights(config_of("STEP").model)
