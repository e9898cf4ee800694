"""Each objective against its formula, written out over the losses of every loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from looped_jax.config.options import Objectives, Parts
from looped_jax.config.registry import PARTS
from looped_jax.config.settings import ModelSettings, Settings
from looped_jax.errors import ConfigError
from looped_jax.model import loss, objectives, transformer
from looped_jax.model.objectives.exit_gate import ExitGateSettings, ExitSettings
from looped_jax.model.objectives.fixed_point import FixedPointSettings
from looped_jax.model.objectives.random_loops import RandomLoopsSettings, drawn_loops
from looped_jax.model.objectives.weighted import WeightedSettings
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import optimizers, train_step
from tests.model.test_kv_cache import random_weights

TOKENS = np.random.default_rng(0).integers(0, 97, (4, 9)).astype(np.int32)
TARGETS = np.random.default_rng(1).integers(-1, 97, (4, 9)).astype(np.int32)
TARGETS[0, :4] = -1  # rows of unequal length
MASK = TARGETS >= 0


def config_of(name, settings=None, loops=3, gate=False):
    sizes = {"layers": 1, "loops": loops, "width": 32, "heads": 2, "seq_len": 9}
    parts = Parts({"exit_gate": PARTS["exit_gate"].Settings(on=True)} if gate else {})
    own = Objectives({name: settings} if settings else {})
    model = ModelSettings(dtype="float32", loss=name, parts=parts, objectives=own, **sizes)
    return resolve(Settings(model=model), vocab_size=97)


def found_and_nats(config):
    """What is differentiated, the token losses [K, B, T] and states [K, B, T, D] of every loop."""
    model, params = config.model, random_weights(config.model)
    every = tuple(range(model.loops))
    hidden = transformer.forward(model, params, TOKENS, return_loops=every).hidden
    nats = np.asarray(loss.token_losses(model, params, hidden, TARGETS))
    batch = {"inputs": TOKENS, "targets": TARGETS}
    objective = objectives.of(model)
    read = hidden[jnp.array(objective.loops(model))]
    total, logged = objective.loss(model, params, read, batch)
    np.testing.assert_allclose(logged, nats.sum((1, 2))[list(objective.loops(model))], rtol=1e-5)
    return total, nats, np.asarray(hidden), params


@pytest.mark.parametrize(
    ("given", "weights"),
    [((), (1, 2, 3)), ((0.2, 0.3, 0.5), (0.2, 0.3, 0.5)), ((2.0, 0.0, 0.0), (2, 0, 0))],
)
def test_weighted(given, weights):
    total, nats, *_ = found_and_nats(config_of("WEIGHTED", WeightedSettings(given)))
    wanted = sum(w * n.sum() for w, n in zip(weights, nats, strict=True)) / sum(weights)
    np.testing.assert_allclose(total, wanted, rtol=1e-5)


def test_weighted_reads_no_loop_without_a_weight_but_the_last():
    model = config_of("WEIGHTED", WeightedSettings((0.0, 1.0, 0.0))).model
    assert model.scored_loops() == (1, 2)
    values = {"model": {"objectives": {"WEIGHTED": {"weights": [0.25, 0.75]}}}}
    assert Settings.from_dict(values).model.objectives["WEIGHTED"].weights == (0.25, 0.75)


@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, -1.0, 1.0), (0.0, 0.0, 0.0)])
def test_weights_that_do_not_fit_the_loops_are_refused(weights):
    message = r"WEIGHTED.weights=.* with model.loops=3; give 3 numbers from 0"
    with pytest.raises(ConfigError, match=message):
        config_of("WEIGHTED", WeightedSettings(weights))


def test_self_weighted():
    config = config_of("SELF_WEIGHTED")
    total, nats, hidden, params = found_and_nats(config)
    rows = nats.sum(2) / MASK.sum(1)
    wanted = sum((rows[k] / 10 * nats[k].sum(1)).sum() for k in range(3)) / 3
    np.testing.assert_allclose(total, wanted, rtol=1e-5)

    def weighted(head, weights):
        losses = loss.token_losses(config.model, params | {"head": head}, hidden, TARGETS)
        return (weights[..., None] / 10 * losses).sum() / 3

    def ours(head):
        batch = {"inputs": TOKENS, "targets": TARGETS}
        own = params | {"head": head}
        return objectives.of(config.model).loss(config.model, own, jnp.asarray(hidden), batch)[0]

    wanted = jax.grad(weighted)(params["head"], rows)  # weights have no gradient
    np.testing.assert_allclose(jax.grad(ours)(params["head"]), wanted, atol=1e-4)


def test_fixed_point():
    config = config_of("FIXED_POINT", FixedPointSettings(0.5))
    total, nats, hidden, _ = found_and_nats(config)
    moved = np.square(hidden[2] - hidden[1]).mean(-1)
    np.testing.assert_allclose(total, nats[2].sum() + 0.5 * moved[MASK].sum(), rtol=1e-5)
    with pytest.raises(ConfigError, match="model.loops=1 leaves model.loss=FIXED_POINT no two"):
        config_of("FIXED_POINT", loops=1)


def gate_of(params, hidden):
    z = hidden @ params["parts.exit_gate.scale"] + params["parts.exit_gate.bias"][0]
    return np.asarray(1 / (1 + np.exp(-z)))


def test_exit():
    total, nats, hidden, params = found_and_nats(config_of("EXIT", ExitSettings(0.3), gate=True))
    leave = gate_of(params, hidden)
    p = np.stack([leave[0], leave[1] * (1 - leave[0]), (1 - leave[0]) * (1 - leave[1])])
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-6)
    entropy = -(p * np.log(p)).sum(0)
    wanted = ((p * nats).sum(0) - 0.3 * entropy)[MASK].sum()
    np.testing.assert_allclose(total, wanted, rtol=1e-5)


def test_exit_gate_alone():
    config = config_of("EXIT_GATE", ExitGateSettings(3.0, 0.1), gate=True)
    total, nats, hidden, params = found_and_nats(config)
    wanted = 0
    for k in (1, 2):
        go_on = 1 / (1 + np.exp(-3.0 * (np.maximum(nats[k - 1] - nats[k], 0) - 0.1)))
        leave = gate_of(params, hidden[k])
        told = -go_on * np.log(1 - leave) - (1 - go_on) * np.log(leave)
        wanted += told[MASK].sum() / 2
    np.testing.assert_allclose(total, wanted, rtol=1e-4)
    rows = np.concatenate([TOKENS, TOKENS[:, :1]], axis=1)[None]
    program = functools.partial(train_step.gradients, config, sharding.one_device())
    grads, _ = jax.jit(program)(params, rows)
    optimizer = optimizers.make_optimizer(config)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    for name, array in params.items():  # the model stays as it is
        assert np.array_equal(array, moved[name]) == ("exit_gate" not in name), name


@pytest.mark.parametrize("name", ["EXIT", "EXIT_GATE"])
def test_without_a_gate_or_a_choice_they_are_refused(name):
    with pytest.raises(ConfigError, match=f"model.loss={name} .* add model.parts.exit_gate.on"):
        config_of(name)
    with pytest.raises(ConfigError, match="model.loops=1 leaves the gate of model.loss="):
        config_of(name, loops=1, gate=True)


@pytest.mark.parametrize(("others", "per_loop"), [(1, False), (2, True)])
def test_random_loops(others, per_loop):
    model = config_of("RANDOM", RandomLoopsSettings(others), loops=4).model
    params, seeds = random_weights(model), np.arange(4, dtype=np.uint32)
    hidden = transformer.forward(model, params, TOKENS, return_loops=(0, 1, 2, 3)).hidden
    targets = np.random.default_rng(3).integers(-1, 97, (4, 4, 9)) if per_loop else TARGETS
    nats = np.asarray(loss.token_losses(model, params, hidden, targets)).sum(2)  # [K, B]
    batch = {"inputs": TOKENS, "targets": targets, "seeds": seeds}
    total, logged = objectives.of(model).loss(model, params, hidden, batch)
    drawn, rows = np.asarray(drawn_loops(seeds, 3, others)), range(4)
    wanted = sum(nats[k, row] for row in rows for k in (*drawn[:, row], 3)) / (others + 1)
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    seen = [sum(nats[k, row] for row in rows if k in drawn[:, row]) for k in range(3)]
    wanted = [*(3 / others * np.array(seen)), nats[3].sum()]
    np.testing.assert_allclose(logged, wanted, rtol=1e-5)
    assert model.read_outs() == others + 1


def test_rows_draw_every_loop_as_often_and_none_twice():
    """So a loop's logged loss, that of the rows that drew it over their share, is unbiased."""
    drawn = np.asarray(drawn_loops(np.arange(3000, dtype=np.uint32), 4, 3))
    assert (np.diff(np.sort(drawn, axis=0), axis=0) > 0).all()
    share = np.bincount(drawn.reshape(-1), minlength=4) / 3000
    np.testing.assert_allclose(share, 3 / 4, atol=5 * np.sqrt(3 / 16 / 3000))


@pytest.mark.parametrize(("others", "loops"), [(3, 3), (1, 1)])
def test_more_random_loops_than_there_are_are_refused(others, loops):
    message = f"RANDOM.others={others}: model.loops={loops} has {loops - 1} before the last"
    with pytest.raises(ConfigError, match=message):
        config_of("RANDOM", RandomLoopsSettings(others), loops=loops)


@pytest.mark.parametrize("name", ["SELF_WEIGHTED", "FIXED_POINT", "EXIT"])
def test_sums_do_not_depend_on_mesh_or_micro_batches(name):
    config = config_of(name, gate=name == "EXIT")
    params = random_weights(config.model)
    rows = np.random.default_rng(2).integers(0, 97, (8, 10)).astype(np.int32)
    mesh = sharding.make_mesh(sharding.parse_mesh("data=2,tensor=2"), jax.devices()[:4])
    (one, alone), (many, shared) = (
        jax.jit(lambda p, r, where=where: train_step.gradients(config, where, p, r))(params, batch)
        for where, batch in ((sharding.one_device(), rows[None]), (mesh, rows.reshape(2, 4, 10)))
    )
    np.testing.assert_allclose(alone["objective"], shared["objective"], rtol=1e-5)
    for weight in one:
        np.testing.assert_allclose(one[weight], many[weight], atol=1e-5, err_msg=weight)
