"""Muon and AdamW as nanochat has them, of February ("seed") and of July 2026 ("head")."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.options import Optimizers, WeightGroups
from looped_jax.config.registry import WEIGHT_GROUPS
from looped_jax.config.settings import MeshConfig, OptimConfig, Settings
from looped_jax.errors import ConfigError
from looped_jax.model.weights import Weight
from looped_jax.runtime import sharding
from looped_jax.training import optimizers
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.optimizers import muon
from looped_jax.training.run_meta import RunMeta
from looped_jax.training.train_state import TrainState

FOLDER = Path(__file__).parents[1] / "golden" / "nanochat"
STEPS = 10
SEED = {
    "orthogonalisation": "polar_express", "normuon": True, "cautious": True,
    "decay_schedule": "linear", "weight_decay": 0.2,
}  # fmt: skip
HEAD = SEED | {
    "safety": 1.01, "equal_rows": True, "full_norm": True, "beta2": 0.9,
    "decay_schedule": "cosine", "momentum_final": 0.9,
}  # fmt: skip
CASES = {"seed": SEED, "head": HEAD}


def arrays_of(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def config_of(case, dtype="float32", **settings):
    meta = json.loads(str(arrays_of(f"opt_{case}_a")["meta"]))

    def group(name, rate):
        beta1, beta2 = meta[f"{name}_betas"]
        return {
            "learning_rate": rate,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": meta.get(f"{name}_wd", 0.0),
        }

    rates = meta["lrs"]
    groups = {
        "table": group("embedding", rates["embedding"]),
        "residual_scalar": group("resid", rates["resid"]),
        "input_scalar": group("x0", rates["x0"]) | {"weight_decay": 0.0},
        "matrix": {"learning_rate": rates["matrix"]},
    }
    return OptimConfig(
        newton_schulz_dtype=dtype,
        grad_clip_norm=0.0,
        eps=meta["eps"],
        warmup_steps=2,
        warmdown_ratio=0.5,
        final_lr_fraction=0.05 if case == "head" else 0.0,
        groups=WeightGroups({n: WEIGHT_GROUPS[n].Settings(**own) for n, own in groups.items()}),
        optimizers=Optimizers({"muon": optimizers.MuonSettings(**CASES[case], **settings)}),
    )


GROUPS = {"embedding": "table", "resid_lambdas": "residual_scalar", "x0_lambdas": "input_scalar"}


def weights_of(arrays):
    """The weights of a case as ours; matrices are (inputs, outputs)."""
    found = {}
    for key in (key for key in arrays if key.startswith("p0.")):
        name, shape = key.removeprefix("p0."), arrays[key].T.shape
        if name == "embedding":
            shape = shape[::-1]
        group = GROUPS.get(name, "matrix")
        axes = {"matrix": ("embed", "mlp"), "table": ("vocab", "embed")}.get(group, (None,))
        found[name] = Weight(shape, axes, group)
    return found


def ours(arrays, prefix, weights):
    found = {name: jnp.asarray(arrays[prefix + name]) for name in weights}
    return {n: jnp.swapaxes(a, -1, -2) if weights[n].group == "matrix" else a
            for n, a in found.items()}  # fmt: skip


def followed(case, monkeypatch, *, dtype="float32", sizes=(1, 1, 1)):
    """Weights after each of the ten steps, and the optimizer's last state."""
    arrays = arrays_of(f"opt_{case}_a")
    weights, config = weights_of(arrays), config_of(case, dtype)
    # The golden samples nanochat's momentum every sixty steps, so that it moves.
    momentum = jnp.asarray(arrays["momentum"], jnp.float32)
    monkeypatch.setattr(muon, "muon_momentum", lambda *_: lambda step: momentum[step])
    multiplier = optimizers.learning_rate_multiplier(config, STEPS)
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    run = optimizers.RunScale(width=768, steps=STEPS, multiplier=multiplier)
    optimizer = optimizers.of_weights(config, weights, run, mesh)
    params, grads = ours(arrays, "p0.", weights), ours(arrays, "grad.", weights)
    where = sharding.state_shardings(mesh, params, weights)
    params = jax.device_put(params, where)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    found = []
    for number in range(STEPS):
        params, state = step(
            params, state, jax.device_put({n: g[number] for n, g in grads.items()}, where)
        )
        found.append(params)
    return arrays, weights, found, state


def check(arrays, weights, found, atol):
    golden = ours(arrays, "p.", weights)
    for place, step in enumerate(arrays["kept_steps"]):
        for name in weights:
            np.testing.assert_allclose(
                found[step][name], golden[name][place], rtol=0, atol=atol, err_msg=f"{name} {step}"
            )


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_in_float32(case, monkeypatch):
    arrays, weights, found, state = followed(case, monkeypatch)
    check(arrays, weights, found, 3e-6)
    paths = jax.tree_util.tree_leaves_with_path(state)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
    for name in (name for name, weight in weights.items() if weight.group == "matrix"):
        kind, index = name.split("_")
        for ending, key in ((f".momentum['{name}']", "momentum"), (f".second['{name}']", "second")):
            own = next(leaf for path, leaf in leaves.items() if path.endswith(ending))
            golden = arrays[f"state.{kind}.{key}"][int(index)].T
            np.testing.assert_allclose(own, golden, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_as_they_ship_in_bfloat16(case, monkeypatch):
    arrays, weights, found, _ = followed(case, monkeypatch, dtype="bfloat16")
    golden = ours(arrays, "asis.p.", weights)
    for name in weights:
        np.testing.assert_allclose(found[-1][name], golden[name], rtol=0, atol=2e-2)


def test_ten_steps_on_a_mesh(monkeypatch):
    arrays, weights, found, state = followed("head", monkeypatch, sizes=(2, 2, 2))
    check(arrays, weights, found, 3e-6)


def collectives(settings, layers):
    """How many there are in an update of so many layers' matrices on eight devices."""
    shapes = {"up": (16, 64), "down": (64, 16)}
    axes = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
    weights = {
        f"blocks.{i}.{n}": Weight(shape, axes[n], "matrix")
        for i in range(layers)
        for n, shape in shapes.items()
    }
    config = OptimConfig(
        newton_schulz_dtype="float32", newton_schulz_steps=1,
        optimizers=Optimizers({"muon": optimizers.MuonSettings(**settings)}),
    )  # fmt: skip
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    run = optimizers.RunScale(width=16, steps=STEPS, multiplier=lambda step: 1.0)
    optimizer = muon.Muon().transformation(config, weights, run, mesh)
    params = {name: jax.ShapeDtypeStruct(w.shape, jnp.float32) for name, w in weights.items()}
    state = jax.eval_shape(optimizer.init, params)
    where = [sharding.state_shardings(mesh, tree, weights) for tree in (params, state)]
    step = jax.jit(
        optimizer.update, in_shardings=(where[0], where[1], where[0]), out_shardings=tuple(where)
    )
    text = step.lower(params, state, params).compile().as_text()
    kinds = r"\s(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    return len(re.findall(kinds, text))


def test_options_add_a_few_collectives_whatever_the_layers():
    plain, head = collectives({}, 8), collectives(HEAD, 8)
    assert collectives(HEAD, 16) == head
    # up and down are batches of their own where rows count; NorMuon adds two sums along two axes.
    assert plain < head <= 2 * plain + 4


@pytest.mark.parametrize("case", CASES)
def test_schedules_of_nanochat(case):
    arrays = arrays_of("schedules")
    config = dataclasses.replace(
        OptimConfig(),
        **{
            "seed": {"warmdown_ratio": 0.5},
            "head": {
                "warmup_steps": 40, "warmdown_ratio": 0.65, "final_lr_fraction": 0.05,
                "momentum_end": 0.97, "momentum_warmup_steps": 400,
            },
        }[case],
        optimizers=Optimizers({"muon": optimizers.MuonSettings(**CASES[case])}),
    )  # fmt: skip
    with jax.enable_x64(True):
        for steps in (100, 1000, 2205):
            at = jnp.asarray(arrays[f"{case}.N{steps}_step"])
            kind = config.optimizers["muon"].decay_schedule
            for name, schedule in (
                ("lr_mult", optimizers.learning_rate_multiplier(config, steps)),
                ("momentum", optimizers.muon_momentum(config, steps)),
                ("wd_mult", optimizers.decay_multiplier(kind, steps)),
            ):
                golden = arrays[f"{case}.N{steps}_{name}"]
                np.testing.assert_allclose(schedule(at), golden, rtol=1e-9, atol=1e-12)


def test_decay_is_cautious_and_of_a_matrix_without_gradient_full():
    weights = {"up": Weight((2, 8), ("embed", "mlp"), "matrix")}
    params = {"up": jnp.arange(1.0, 17).reshape(2, 8)}  # all above 0
    run = optimizers.RunScale(width=768, steps=STEPS, multiplier=lambda step: 1.0)

    def update(grads, **settings):
        own = Optimizers({"muon": optimizers.MuonSettings(**(HEAD | settings))})
        config = OptimConfig(
            newton_schulz_dtype="float32", matrix_learning_rate=0.1, optimizers=own
        )  # fmt: skip
        optimizer = optimizers.of_weights(config, weights, run)
        one = jax.jit(lambda g: optimizer.update({"up": g}, optimizer.init(params), params)[0])
        return np.asarray(one(grads)["up"])

    full = -0.1 * 2 * 0.2 * params["up"]  # the factor 2 is the root of outputs / inputs
    np.testing.assert_allclose(update(jnp.zeros((2, 8))), full, rtol=1e-6)
    grads = jax.random.normal(jax.random.key(0), (2, 8))
    plain = update(grads, weight_decay=0.0)
    assert 0 < (plain > 0).sum() < plain.size
    np.testing.assert_allclose(update(grads), plain + np.where(plain <= 0, full, 0), atol=1e-6)
    np.testing.assert_allclose(update(grads, cautious=False), plain + full, atol=1e-6)


def test_the_state_comes_back_from_disk_and_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    arrays = arrays_of("opt_head_a")
    weights, config = weights_of(arrays), config_of("head")
    run = optimizers.RunScale(
        width=768, steps=STEPS, multiplier=optimizers.learning_rate_multiplier(config, STEPS)
    )
    optimizer = optimizers.of_weights(config, weights, run)
    grads = ours(arrays, "grad.", weights)

    @jax.jit
    def step(state):
        own = {name: g[state.step] for name, g in grads.items()}
        updates, inner = optimizer.update(own, state.optimizer, state.params)
        return TrainState(jax.tree.map(jnp.add, state.params, updates), inner, state.step + 1)

    params = ours(arrays, "p0.", weights)
    state = TrainState(params, optimizer.init(params), jnp.zeros([], jnp.int32))
    for _ in range(4):
        state = step(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state, RunMeta(step=4))
        checkpoints.wait()
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        again = checkpoints.restore(4, abstract)
    for _ in range(3):
        state, again = step(state), step(again)
    jax.tree.map(np.testing.assert_array_equal, state, again)


def test_a_run_may_not_be_made_longer_once_its_decay_has_fallen():
    config = OptimConfig(optimizers=Optimizers({"muon": optimizers.MuonSettings(**SEED)}))
    assert optimizers.same_until(OptimConfig(), 10, 20, 5)
    assert not optimizers.same_until(config, 10, 20, 5)


def test_a_warm_up_is_given_once():
    with pytest.raises(ConfigError, match="warmup_ratio=0.1 and optim.warmup_steps=4 both"):
        Settings.from_dict({"optim": {"warmup_ratio": 0.1, "warmup_steps": 4}})
