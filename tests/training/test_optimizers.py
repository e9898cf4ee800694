"""The optimizer against the reference's training runs, and each part on its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from looped_jax.config import presets
from looped_jax.config.options import Optimizers, Parts, WeightGroups
from looped_jax.config.registry import OPTIMIZERS, PARTS, WEIGHT_GROUPS
from looped_jax.config.settings import (
    MeshConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
)
from looped_jax.errors import ConfigError
from looped_jax.model import loss, transformer
from looped_jax.model.weights import Weight
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import optimizers, train_step
from tests import golden_cases


@functools.partial(jax.jit, static_argnums=0)
def last_loop_loss(model, params, tokens):
    states = transformer.forward(model, params, tokens[:, :-1])
    return loss.token_losses(model, params, states.hidden, tokens[:, 1:]).mean()


def run_golden(case, sizes=(1, 1, 1)):
    """Train a golden case; the reference reports the last micro-batch's loss before each step."""
    hyper = OptimConfig(newton_schulz_dtype=case.hyper["newton_schulz_dtype"])
    config = resolve(Settings(model=case.model, optim=hyper))
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    optimizer = optimizers.make_optimizer(config, mesh, steps=case.hyper["steps"])
    current = train_step.create(config, optimizer, mesh)
    where = transformer.shardings(case.model, mesh)
    params = jax.device_put(case.weights("param0"), where)
    current = dataclasses.replace(current, params=params)
    step = train_step.make_train_step(config, optimizer, mesh)
    losses, norms = [], []
    for tokens in case.arrays["tokens"]:
        losses.append(last_loop_loss(case.model, current.params, tokens[-1]))
        current, metrics = step(current, tokens)
        norms.append(metrics["grad_norm"])
    return np.array(losses), np.array(norms), current.params


def trained(config, sizes, steps):
    """Losses of repeated steps on the same rows, and the last state."""
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    optimizer = optimizers.make_optimizer(config, mesh)
    state = train_step.create(config, optimizer, mesh)
    step = train_step.make_train_step(config, optimizer, mesh)
    rows, losses = np.random.default_rng(0).integers(0, 61, (1, 8, 9)).astype(np.int32), []
    for _ in range(steps):
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
    return losses, state


def of_optimizer(name):
    sizes = {"layers": 1, "loops": 2, "width": 32, "heads": 2, "seq_len": 8}
    parts = Parts({"kv_shift": PARTS["kv_shift"].Settings(on=True)})  # vectors too
    return resolve(
        Settings(
            model=ModelSettings(dtype="float32", parts=parts, **sizes),
            optim=OptimConfig(optimizer=name, newton_schulz_dtype="float32"),
            train=TrainSettings(steps=30),
        ),
        vocab_size=61,
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_no_mesh_changes_it(name):
    config = of_optimizer(name)
    losses, state = trained(config, (1, 1, 1), 20)
    assert losses[-1] < losses[0] - 1
    assert not jax.tree.reduce(lambda found, leaf: found | ~np.isfinite(leaf).all(), state, False)
    many, cut = trained(config, (2, 2, 2), 5)
    np.testing.assert_allclose(many, losses[:5], atol=1e-4)
    matrix = "blocks.0.mlp.up"
    spec = cut.params[matrix].sharding.spec
    found = jax.tree_util.tree_leaves_with_path(cut.optimizer)
    states = [leaf for path, leaf in found if getattr(path[-1], "key", None) == matrix]
    assert states and all(leaf.sharding.spec == spec for leaf in states)


def test_an_optimizer_that_averages_gives_other_weights_to_evaluation():
    @OPTIMIZERS.register("averaging")
    class Averaging(optimizers.Optimizer):
        def transformation(self, config, weights, run, mesh=None):
            mean = optax.tree_utils.tree_zeros_like
            return optax.chain(
                optax.sgd(0.1),
                optax.GradientTransformation(
                    mean, lambda updates, mean, params: (
                        updates, jax.tree.map(lambda m, p: (m + p) / 2, mean, params)
                    ),
                ),
            )  # fmt: skip

        def evaluation_params(self, state):
            return state.optimizer[1][1]

    try:
        config = of_optimizer("averaging")
        (_, fresh), (_, state) = (trained(config, (1, 1, 1), steps) for steps in (0, 1))
        found = optimizers.evaluation_params(config.optim, state)
        for name, weight in fresh.params.items():
            np.testing.assert_array_equal(found[name], weight / 2)
        for name in ("muon", "adamw"):
            _, plain = trained(of_optimizer(name), (1, 1, 1), 1)
            assert optimizers.evaluation_params(of_optimizer(name).optim, plain) is plain.params
    finally:
        del OPTIMIZERS._found["averaging"]


def test_the_rate_of_matrices_is_adamws_own():
    config = of_optimizer("adamw")
    still = Optimizers({"adamw": optimizers.AdamWSettings(matrix_learning_rate=0.0)})
    stopped = dataclasses.replace(config, optim=dataclasses.replace(config.optim, optimizers=still))
    start = transformer.init_params(config.model, jax.random.key(0))
    for each, moves in ((config, True), (stopped, False)):
        _, state = trained(each, (1, 1, 1), 2)
        assert np.array_equal(state.params["blocks.0.mlp.up"], start["blocks.0.mlp.up"]) != moves
        assert not np.array_equal(state.params["head"], start["head"])


@pytest.mark.parametrize("name", [n for n in golden_cases.TRAINING if "fp32" in n])
def test_golden_training_in_float32(name):
    case = golden_cases.load(name)
    losses, norms, params = run_golden(case)
    np.testing.assert_allclose(losses, case.arrays["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(norms, case.arrays["grad_norms"], rtol=1e-4)
    for tensor, golden in case.weights("param").items():
        assert np.linalg.norm(params[tensor] - golden) < 1e-4 * np.linalg.norm(golden), tensor


def test_golden_training_with_bfloat16_orthogonalisation():
    """Rounding differs between libraries: the losses agree, single weights need not."""
    case = golden_cases.load("train_FLT_K3_ns_bf16")
    losses, _, _ = run_golden(case)
    exact = golden_cases.load("train_FLT_K3_ns_fp32").arrays["losses"]
    spread = np.abs(case.arrays["losses"] - exact).max()  # what bfloat16 moves the reference
    assert np.abs(losses - case.arrays["losses"]).max() < 2 * spread
    assert spread < 5e-3


ALONE = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((2, 1, 1), (1, 2, 1), (1, 1, 2))]


@pytest.mark.parametrize("sizes", [*ALONE, (2, 1, 2), (1, 2, 2)])
def test_golden_training_on_a_mesh(sizes):
    case = golden_cases.load("train_FLT_K3_ns_fp32")
    losses, norms, _ = run_golden(case, sizes)
    np.testing.assert_allclose(losses, case.arrays["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(norms, case.arrays["grad_norms"], rtol=1e-4)


def test_golden_schedules():
    case = golden_cases.load("train_FLT_K3_ns_fp32")
    multiplier = optimizers.learning_rate_multiplier(OptimConfig(), 10)
    found = [multiplier(step) for step in range(10)]
    np.testing.assert_allclose(found, case.arrays["lr_multiplier"], atol=1e-7)
    momentum = optimizers.muon_momentum(OptimConfig())
    found = [momentum(step) for step in range(10)]
    np.testing.assert_allclose(found, case.arrays["muon_momentum"], atol=1e-6)
    assert momentum(300) == momentum(10_000) == pytest.approx(0.95)


def test_schedule_with_warmup_and_a_floor():
    config = OptimConfig(warmup_ratio=0.1, warmdown_ratio=0.5, final_lr_fraction=0.1)
    multiplier = optimizers.learning_rate_multiplier(config, 100)
    assert multiplier(0) == pytest.approx(0.1)
    assert multiplier(9) == multiplier(10) == multiplier(50) == 1
    assert multiplier(75) == pytest.approx(0.5 + 0.5 * 0.1)
    assert multiplier(99) == pytest.approx(0.02 + 0.98 * 0.1)


def test_orthogonalised_singular_values_are_near_one():
    matrices = jax.random.normal(jax.random.key(0), (3, 24, 40))
    values = jnp.linalg.svd(optimizers.orthogonalize(matrices, 5), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3


def test_same_shaped_matrices_share_one_batched_call():
    params = {f"blocks.{i}.{n}": jnp.ones(s) for i in range(3) for n, s in SHAPES.items()}
    axes = {"out": ("heads", "embed"), "down": ("mlp", "embed")}
    weights = {
        name: Weight(leaf.shape, axes.get(name.split(".")[-1], ("embed", "mlp")), "matrix")
        for name, leaf in params.items()
    }
    muon = optimizers.scale_by_muon(OptimConfig(newton_schulz_dtype="float32"), weights)
    program = jax.make_jaxpr(lambda g: muon.update(g, muon.init(params))[0])(params)
    products = str(program).count("dot_general")
    assert products == 2 * 3 * 5  # shapes (up to transposition) × products per step × steps


SHAPES = {
    "attention.query": (16, 16),
    "attention.out": (16, 16),
    "mlp.up": (16, 64),
    "mlp.down": (64, 16),
}


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (16, 16)])
def test_muon_scales_by_outputs_over_inputs(shape):
    grads = {"blocks.0.mlp.up": jax.random.normal(jax.random.key(0), shape)}
    weights = {"blocks.0.mlp.up": Weight(shape, ("embed", "mlp"), "matrix")}
    muon = optimizers.scale_by_muon(OptimConfig(newton_schulz_dtype="float32"), weights)
    update = muon.update(grads, muon.init(grads))[0]["blocks.0.mlp.up"]
    top = jnp.linalg.svd(update, compute_uv=False)[0]
    assert top / max(1, shape[1] / shape[0]) ** 0.5 == pytest.approx(1, abs=0.3)


THREE = {
    "embed": Weight((4, 2), ("vocab", "embed"), "table"),
    "head": Weight((2, 4), ("embed", "vocab"), "head"),
    "blocks.0.mlp.up": Weight((2, 2), ("embed", "mlp"), "matrix"),
}


def run_of(width, **sizes):
    return optimizers.RunScale(width, steps=100, multiplier=lambda step: 1.0, **sizes)


def test_clipping_is_by_the_global_norm_and_can_be_off():
    params = {"embed": jnp.zeros((4, 2)), "head": jnp.zeros((2, 4)), "blocks.0.mlp.up": jnp.eye(2)}
    grads = jax.tree.map(lambda p: 10 * jnp.ones_like(p), params)
    norm = optax.tree.norm(grads)

    def first_moment(clip):
        optimizer = optimizers.of_weights(OptimConfig(grad_clip_norm=clip), THREE, run_of(768))
        after = optimizer.update(grads, optimizer.init(params), params)[1]
        found = jax.tree_util.tree_leaves_with_path(after)
        return next(v for p, v in found if ".mu" in jax.tree_util.keystr(p) and "embed" in str(p))

    np.testing.assert_allclose(first_moment(1.0), 0.2 * grads["embed"] / norm, rtol=1e-5)
    np.testing.assert_allclose(first_moment(0.0), 0.2 * grads["embed"], rtol=1e-5)


def with_groups(**groups):
    own = {name: WEIGHT_GROUPS[name].Settings(**settings) for name, settings in groups.items()}
    return OptimConfig(groups=WeightGroups(own), embedding_learning_rate=0.2)


GROUPED = {
    "embed": Weight((4, 2), ("vocab", "embed"), "table"),
    "values": Weight((4, 2), ("vocab", "embed"), "value_table"),
    "matrix": Weight((2, 2), ("embed", "mlp"), "matrix"),
    "scale": Weight((2,), (None,), "vector"),
    "smear": Weight((2,), (None,), "smear"),
    "low": Weight((2, 2, 1), (None, None, None), "low_rank"),
}


def first_updates(config, steps=1, **sizes):
    """Size of the last of `steps` updates by ones, and with weights that decay would be seen on."""
    params = {name: jnp.full(w.shape, 10.0) for name, w in GROUPED.items()}
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer = optimizers.of_weights(config, GROUPED, run_of(192, **sizes))
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, params)
    return {name: float(jnp.abs(update).max()) for name, update in updates.items()}


def test_a_group_has_its_own_rate_or_its_parent_s():
    plain = first_updates(OptimConfig())
    expected = {"embed": 0.4, "values": 0.4, "scale": 0.04, "smear": 0.04, "low": 0.002}
    assert {n: plain[n] for n in expected} == pytest.approx(expected, rel=1e-5)
    found = first_updates(
        with_groups(
            vector={"learning_rate": 0.1, "width_scaling": False},
            value_table={"learning_rate": 0.15, "weight_decay": 0.01},
            matrix={"learning_rate": 0.04},
        )
    )
    expected = {"embed": 0.4, "values": 0.3 * 1.1, "scale": 0.1, "smear": 0.1, "low": 0.001}
    assert {n: found[n] for n in expected} == pytest.approx(expected, rel=1e-5)
    assert found["matrix"] == pytest.approx(2 * plain["matrix"], rel=1e-5)


def test_a_group_can_warm_up_by_itself():
    config = with_groups(smear={"warmup_steps": 4})
    for steps, share in ((1, 0.25), (3, 0.75), (4, 1.0), (6, 1.0)):
        found = first_updates(config, steps)
        assert found["smear"] == pytest.approx(share * found["scale"], rel=1e-4)


def test_rates_grow_with_the_root_of_the_batch_where_they_may():
    config = dataclasses.replace(
        with_groups(smear={"batch_scaling": False}), reference_batch_tokens=100
    )
    plain, found = first_updates(OptimConfig()), first_updates(config, tokens_per_step=400)
    for name in GROUPED:
        grown = 1 if name == "smear" else 2
        assert found[name] == pytest.approx(grown * plain[name], rel=1e-5), name


def test_settings_of_a_group_that_the_model_has_not_are_told():
    values = presets.make("nanochat", "laptop")
    values.optim.groups.smear.learning_rate = 0.2
    told = ["optim.groups.smear is given, and no weight of this model is of that group"]
    for on, wanted in ((False, told), (True, [])):
        values.model.parts.smear.on = on
        config = resolve(Settings.from_dict(values), vocab_size=512)
        assert optimizers.unused_groups(config) == wanted


def test_settings_of_groups_that_would_have_no_effect_are_refused():
    with pytest.raises(ConfigError, match="optim.groups.matrix.eps=0.1 has no effect; Muon"):
        first_updates(with_groups(matrix={"eps": 0.1}))

    class Plain(optimizers.Optimizer):
        def transformation(self, config, weights, run, mesh=None):
            return optax.sgd(0.1)

    OPTIMIZERS.register("plain_sgd")(Plain)
    try:
        config = dataclasses.replace(with_groups(smear={"eps": 0.1}), optimizer="plain_sgd")
        with pytest.raises(ConfigError, match="optim.groups.smear has no effect on"):
            first_updates(config)
    finally:
        del OPTIMIZERS._found["plain_sgd"]


def test_adamw_learning_rates_scale_with_width():
    params = {"embed": jnp.zeros((4, 2)), "head": jnp.zeros((2, 4)), "blocks.0.mlp.up": jnp.eye(2)}
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer = optimizers.of_weights(OptimConfig(), THREE, run_of(192))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["embed"], -0.2 * 2, rtol=1e-5)
    np.testing.assert_allclose(updates["head"], -0.004 * 2, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_devices_share_the_orthogonalisation(sizes):
    """No matrix is worked on twice: FLOPs per device fall with the number of devices."""
    names = [f"blocks.{i}.attention.{part}" for i in range(8) for part in ("query", "out")]
    shapes = {name: jax.ShapeDtypeStruct((32, 32), jnp.float32) for name in names}
    axes = {"query": ("embed", "heads"), "out": ("heads", "embed")}
    weights = {n: Weight((32, 32), axes[n.split(".")[-1]], "matrix") for n in names}

    def program(*sizes):
        mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        muon = optimizers.scale_by_muon(OptimConfig(newton_schulz_dtype="float32"), weights, mesh)
        where = sharding.state_shardings(mesh, shapes, weights)
        run = jax.jit(lambda g: muon.update(g, muon.init(g))[0], in_shardings=(where,))
        return run.lower(shapes).compile()

    grads = {name: jax.random.normal(jax.random.key(i), (32, 32)) for i, name in enumerate(names)}
    one, many = program(1, 1, 1), program(*sizes)
    assert many.cost_analysis()["flops"] < one.cost_analysis()["flops"] / 8 * 1.3
    alone = one(jax.device_put(grads, one.input_shardings[0][0]))
    together = many(jax.device_put(grads, many.input_shardings[0][0]))
    for name in names:
        np.testing.assert_allclose(alone[name], together[name], atol=1e-5)
