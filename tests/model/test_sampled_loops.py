"""Loop counts as data: against fixed counts, an unrolled reference, meshes and single rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.options import LoopDistributions, Parts
from looped_jax.config.registry import LOOP_RULES, PARTS
from looped_jax.config.settings import (
    LoopSamplingConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
)
from looped_jax.model import loss, sampled_loops, transformer
from looped_jax.model.probe import TAPS
from looped_jax.model.sampled_loops import Counts
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import optimizers, train_step
from looped_jax.training.loop_distributions import UniformSettings
from looped_jax.training.loop_sampler import LoopSampler
from looped_jax.training.row_draws import RowDraws
from tests.model.test_kv_cache import random_weights

ROWS = np.random.default_rng(0).integers(0, 97, (16, 10)).astype(np.int32)
LAYERS = 1
QUICK = ("FLT", "LT")  # one whose loops read the embedding again, and the one that does not
VARIANTS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LOOP_RULES
]
TOKENS, TARGETS = ROWS[:4, :-1], ROWS[:4, 1:]


def config_of(variant="FLT", parts=(), loss="END", **sampling):
    own = {"uniform": UniformSettings(counts=(1, 2, 3, 5, 6))}
    sizes = {"layers": LAYERS, "loops": 4, "width": 32, "heads": 2, "seq_len": 9}
    on = Parts({name: dataclasses.replace(PARTS[name].Settings(), on=True) for name in parts})
    return resolve(
        Settings(
            model=ModelSettings(variant=variant, dtype="float32", loss=loss, parts=on, **sizes),
            optim=OptimConfig(newton_schulz_dtype="float32"),
            train=TrainSettings(
                steps=20,
                tokens_per_step=16 * 9,
                loop_sampling=LoopSamplingConfig(
                    distributions=LoopDistributions(own if sampling else {}), **sampling
                ),
            ),
        ),
        vocab_size=97,
    )


def counts_of(total, backward, rows=None):
    return Counts(None if rows is None else jnp.array(rows), jnp.int32(total), jnp.int32(backward))


@functools.cache
def sampled(config, longest=3):
    """Jitted (params, tokens, targets, counts, seeds) -> gradients, (loss, states, norms)."""

    def objective(params, tokens, targets, counts, seeds=None):
        states = sampled_loops.forward(config, params, tokens, counts, longest=longest, seeds=seeds)
        nats = loss.token_losses(config, params, states.hidden, targets).sum()
        return nats, (nats, states.hidden[0], states.norms)

    return jax.jit(jax.grad(objective, has_aux=True))


@functools.cache
def unrolled(config, total, backward):
    """Likewise, loop by loop in Python, the state stopped between prefix and the rest."""

    def objective(params, tokens, targets):
        h, norms = None, []
        for done in range(total):
            weights = params if done >= total - backward else jax.lax.stop_gradient(params)
            states = transformer.forward(
                config, weights, tokens, loops=done + 1, start=h, done=done
            )
            h = states.hidden[0]
            h = h if done >= total - backward else jax.lax.stop_gradient(h)
            norms.append(states.norms[0])
        nats = loss.token_losses(config, params, h[None], targets).sum()
        return nats, (nats, h, jnp.stack(norms[total - backward :]))

    return jax.jit(jax.grad(objective, has_aux=True))


def assert_close(found, wanted, tolerance=2e-6):
    for name, gradient in wanted.items():
        error = np.abs(found[name] - gradient).max() / max(np.abs(gradient).max(), 1e-3)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_an_unrolled_pass_that_stops_before_the_last_loops(variant):
    config = config_of(variant).model
    params, program = random_weights(config), sampled.__wrapped__(config)  # of this test alone
    for total, backward in ((2, 2), (4, 2)):
        found, (nats, hidden, norms) = program(params, TOKENS, TARGETS, counts_of(total, backward))
        wanted, told = unrolled(config, total, backward)(params, TOKENS, TARGETS)
        np.testing.assert_allclose(nats, told[0], rtol=2e-6)
        np.testing.assert_allclose(hidden, told[1], atol=2e-5)
        np.testing.assert_allclose(norms[3 - backward :], told[2], rtol=1e-5)
        assert (norms[: 3 - backward] == 0).all()
        assert_close(found, wanted, 1e-5)
    assert program._cache_size() == 1


@pytest.mark.parametrize("remat", ["offload", "dots", "none"])
def test_what_is_kept_for_the_backward_pass_changes_no_gradient(remat):
    config = config_of().model
    other = dataclasses.replace(config, remat=remat)
    params = random_weights(config)
    arguments = params, TOKENS, TARGETS, counts_of(5, 2)
    assert_close(sampled(other)(*arguments)[0], sampled(config)(*arguments)[0])


@pytest.mark.parametrize(
    ("variant", "parts"),
    [
        *(pytest.param(*v.values, (), marks=v.marks) for v in VARIANTS),
        *(("FLT", (n,)) for n in PARTS),
    ],
)
def test_every_sequence_is_as_if_it_ran_alone(variant, parts):
    """A row of p loops, k of them with gradients at most: its last min(p, k) have some.

    What it draws is its own, too: its initial state, and the noise of its loops. Gradients are
    compared row by row, with targets in that row alone: those of four rows may cancel, as the sum
    of residual_scalars' is a tenth of its summands, and rounding is a share of these.
    """
    config = config_of(variant, parts).model
    params, rows, seeds = random_weights(config), [1, 5, 2, 4], np.arange(4, dtype=np.uint32)
    counts = counts_of(5, 3, rows)
    for row, count in enumerate(rows):
        here, own = slice(row, row + 1), np.full_like(TARGETS, -1)
        own[here] = TARGETS[here]
        found, (nats, hidden, _) = sampled(config)(params, TOKENS, own, counts, seeds)
        wanted, (alone, state, _) = sampled(config)(
            params, TOKENS[here], TARGETS[here], counts_of(count, min(count, 3)), seeds[here]
        )
        np.testing.assert_allclose(hidden[here], state, atol=2e-5)
        np.testing.assert_allclose(nats, alone, rtol=2e-6)
        assert_close(found, wanted, 1e-5)


def test_a_truncated_plain_loop_starves_its_embedding():
    """What LoopSampler warns of: the input's gradient is exactly zero, the other rules' is not."""
    for variant in ("LT", "FLT"):
        config = config_of(variant).model
        found, _ = sampled(config)(random_weights(config), TOKENS, TARGETS, counts_of(4, 3))
        assert LOOP_RULES[variant].rereads_embedding == (np.abs(found["embed"]).max() > 0)


def steps_of(config, sizes, micro_batches, steps=6):
    """Metrics of some steps of one row batch on a mesh; one compile whatever was drawn."""
    mesh = sharding.make_mesh(
        sharding.parse_mesh("data={},fsdp={},tensor={}".format(*sizes)),
        jax.devices()[: int(np.prod(sizes))],
    )
    optimizer = optimizers.make_optimizer(config, mesh)
    state = train_step.create(config, optimizer, mesh)
    step, draws, found = (
        train_step.make_train_step(config, optimizer, mesh),
        RowDraws(config),
        [],
    )
    for number in range(1, steps + 1):
        batch = jax.tree.map(
            lambda a: a.reshape(micro_batches, -1, *a.shape[1:]), draws.join(ROWS, number)
        )
        state, metrics = step(state, batch)
        found.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    return found


SEQUENCES = {"distribution": "uniform", "per": "sequence", "backward_loops": 2}
STEPS = {"distribution": "uniform", "backward_loops": 3, "backward_curriculum": "linear"}


@pytest.mark.parametrize("sampling", [SEQUENCES, STEPS])
def test_meshes_and_micro_batches_change_nothing(sampling):
    config = config_of(**sampling)
    alone = steps_of(config, (1, 1, 1), 1)
    drawn = {round(float(metrics["loops"]["drawn"]), 3) for metrics in alone}
    assert len(drawn) > 1
    for sizes, micro_batches in (((1, 1, 1), 4), ((2, 2, 2), 2)):
        others = steps_of(config, sizes, micro_batches)
        for one, other in zip(alone, others, strict=True):
            np.testing.assert_allclose(other["loss"], one["loss"], rtol=2e-6)
            np.testing.assert_allclose(other["loops"]["drawn"], one["loops"]["drawn"], rtol=1e-6)
            assert other["loops"]["spent"] <= one["loops"]["spent"]


def test_what_a_step_has_spent_is_told():
    config = config_of(**SEQUENCES)
    sampler = LoopSampler(config)
    for number, metrics in enumerate(steps_of(config, (2, 1, 1), 4, steps=3), start=1):
        drawn = sampler.draw(number)
        longest = drawn.reshape(4, -1).max(1)  # of each micro-batch, over both devices
        loops = {"drawn": drawn.mean(), "spent": longest.mean()}
        loops["backward"] = np.minimum(longest, 2).mean()
        assert metrics["loops"] == pytest.approx(loops)


def test_norms_are_of_the_micro_batches_that_ran_a_loop():
    config = config_of(distribution="uniform", backward_loops=3)
    params, mesh = random_weights(config.model), sharding.one_device()
    program = jax.jit(functools.partial(train_step.gradients, config, mesh, diagnostics=True))
    text = {"inputs": ROWS[:4, :-1].reshape(2, 2, 9), "targets": ROWS[:4, 1:].reshape(2, 2, 9)}

    def of(*counts):
        loops = np.array(counts, np.int32)[:, None].repeat(2, 1)
        batch = text | {"loops": loops, "backward_loops": np.full_like(loops, 3)}
        return program(params, batch)[1]

    both, short = of(2, 5), of(2, 1)
    assert both["norms"].shape == (3,) and np.isfinite(both["norms"]).all()
    assert np.isnan(short["norms"]).tolist() == [True, False, False]
    inside = both["diagnostics"]
    assert inside["residual_norm"].shape == (3, 1)
    assert all(inside[f"gradient_{name}"].shape == (3, 1) for name in TAPS)
    # the last layer's norm is the loop's
    np.testing.assert_allclose(inside["residual_norm"][:, -1], both["norms"], rtol=1e-6)
    np.testing.assert_allclose(of(5, 5)["norms"], of(5, 5)["diagnostics"]["residual_norm"][:, -1])


@pytest.mark.parametrize("loss", ["END", "STEP"])
def test_off_it_is_the_same_program(loss):
    """The step holds no loop of a traced length, and only the operations of a fixed one."""
    config = config_of(loss=loss)
    assert not config.train.loop_sampling.on
    run = functools.partial(train_step.gradients, config, sharding.one_device())
    shapes = transformer.init_shapes(config.model)
    program = str(jax.make_jaxpr(run)(shapes, ROWS[None]))
    by_platform = program.count("branches_platforms=((")
    assert " while[" not in program and program.count(" cond[") == by_platform
    on = config_of(distribution="uniform", backward_loops=2)
    run = functools.partial(train_step.gradients, on, sharding.one_device())
    batch = jax.tree.map(lambda a: a[None], RowDraws(on).join(ROWS, 1))
    program = str(jax.make_jaxpr(run)(shapes, batch))
    assert " while[" in program
    assert program.count(" cond[") > program.count("branches_platforms=((")
