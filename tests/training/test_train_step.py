"""The train step on meshes of fake devices: same numbers, one compile, communication without K."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from looped_jax.config.settings import (
    MeshConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
)
from looped_jax.errors import ConfigError
from looped_jax.evaluation import bits_per_byte, scoring
from looped_jax.model import attention_kernels, transformer
from looped_jax.model.weights import Weight
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.runtime.hardware import AttentionSupport
from looped_jax.training import optimizers, train_step
from tests.covering import DISTINCT_RULES, grid

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 8, 17)).astype(np.int32)


def make_config(**model):
    settings = {"layers": 2, "loops": 3, "width": 64, "heads": 8, "seq_len": 16} | model
    return resolve(
        Settings(
            model=ModelSettings(dtype="float32", **settings),
            optim=OptimConfig(newton_schulz_dtype="float32"),
            train=TrainSettings(steps=20),
        ),
        vocab_size=97,
    )


def make_optimizer(config, mesh=None):
    """With the rates of width 64 for all of them: narrower ones would learn faster than a test of
    equal numbers on other meshes can bear."""
    run = optimizers.RunScale(
        width=64, steps=20, multiplier=optimizers.learning_rate_multiplier(config.optim, 20)
    )
    return optimizers.of_weights(config.optim, transformer.weights(config.model), run, mesh)


def mesh_of(*sizes):
    return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


@functools.cache
def run(config, sizes, steps):
    """Losses of so many steps on a mesh, and the weights after them."""
    mesh = mesh_of(*sizes)
    optimizer = make_optimizer(config, mesh)
    current = train_step.create(config, optimizer, mesh)
    step = train_step.make_train_step(config, optimizer, mesh)
    found = []
    for _ in range(steps):
        current, metrics = step(current, TOKENS)
        found.append(metrics["loss"])
    assert step._cache_size() == 1
    return np.array(found), current.params


def losses(config, sizes, steps=20):
    return run(config, sizes, steps)[0]


@functools.cache
def bits(config, sizes):
    """Bits per byte of other tokens at 1 and 3 loops, after those steps."""
    mesh = mesh_of(*sizes)
    score = scoring.make_score_step(config.model, mesh, (1, 3))
    rows = [{"inputs": TOKENS[1, :, 1:], "targets": TOKENS[1, ::-1, :-1]}]
    sizes_of_tokens = np.full(97, 4, np.int32)
    found = bits_per_byte.bits_per_byte(
        score, run(config, sizes, 20)[1], rows, sizes_of_tokens, loop_counts=(1, 3), mesh=mesh
    )
    return tuple(found.values())


@pytest.mark.parametrize(
    "sizes",
    [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8), pytest.param((4, 2, 1), marks=pytest.mark.slow)],
)
def test_every_mesh_gives_the_single_device_losses_and_bits_per_byte(sizes):
    for of in (losses, bits):
        np.testing.assert_allclose(
            of(make_config(), sizes), of(make_config(), (1, 1, 1)), atol=1e-4
        )


@grid(strength=1, variant=DISTINCT_RULES, attention=("full", "mla"))
def test_every_rule_and_attention_on_a_mesh(variant, attention):
    small = {"layers": 1, "loops": 2, "width": 32, "heads": 4, "latent_rank": 8}
    config = make_config(variant=variant, attention=attention, **small)
    many, one = (losses(config, sizes, steps=8) for sizes in ((2, 2, 2), (1, 1, 1)))
    np.testing.assert_allclose(many, one, atol=1e-4)


def test_keeping_products_in_the_hosts_memory_changes_nothing_on_a_mesh():
    small = {"layers": 1, "loops": 2, "width": 32, "heads": 4}
    kept, moved = (make_config(remat=remat, **small) for remat in ("dots", "offload"))
    np.testing.assert_allclose(losses(moved, (2, 2, 2), 3), losses(kept, (2, 2, 2), 3), atol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_a_step_transfers_nothing_behind_ones_back(sizes):
    """Nothing goes between host and devices, or between devices, but what was placed there."""
    small = {"layers": 1, "loops": 2, "width": 32, "heads": 4}
    config, mesh = make_config(**small), mesh_of(*sizes)
    optimizer = make_optimizer(config, mesh)
    current = train_step.create(config, optimizer, mesh)
    step = train_step.make_train_step(config, optimizer, mesh)
    placed = jax.device_put(TOKENS, sharding.batch_sharding(mesh))
    with jax.transfer_guard("disallow"):
        with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
            step(current, TOKENS)  # the guard is awake
        for _ in range(2):
            current, metrics = step(current, placed)
        assert np.isfinite(jax.device_get(metrics["loss"]))


def test_every_leaf_is_cut_as_its_weight_says():
    config, mesh = make_config(attention="mla", latent_rank=16), mesh_of(1, 4, 2)
    optimizer = make_optimizer(config)
    current = train_step.create(config, optimizer, mesh)
    for leaf in jax.tree.leaves(current):
        if leaf.ndim:
            assert leaf.addressable_shards[0].data.size * 4 <= leaf.size
    weights = transformer.weights(config.model)
    assert weights.keys() == current.params.keys()
    for name, weight in weights.items():
        assert weight.shape == current.params[name].shape


def test_states_of_other_shapes_are_cut_where_they_have_the_weights_size():
    weights = {"w": Weight((8, 12), ("embed", "mlp"), "matrix")}
    state = {
        "row": {"w": np.zeros((8, 1))}, "square": {"w": np.zeros((12, 12))},
        "like": {"w": np.zeros((8, 12))}, "count": np.zeros([]), "w_of_none": np.zeros((8, 12)),
    }  # fmt: skip
    where = sharding.state_shardings(mesh_of(1, 4, 2), state, weights)
    found = {name: jax.tree.leaves(leaf)[0].spec for name, leaf in where.items()}
    assert found == {
        "row": P("fsdp", None), "square": P(None, "tensor"), "like": P("fsdp", "tensor"),
        "count": P(), "w_of_none": P(),
    }  # fmt: skip


def test_an_axis_is_cut_once():
    weights = {"latent": Weight((8, 4), ("embed", "latent"), "matrix")}
    assert sharding.specs(weights) == {"latent": P("fsdp", None)}


def test_fresh_weights_do_not_depend_on_the_mesh():
    config = make_config()
    optimizer = make_optimizer(config)
    one, eight = (train_step.create(config, optimizer, mesh_of(*s)) for s in ((1, 1, 1), (2, 2, 2)))
    for name, weight in one.params.items():
        np.testing.assert_array_equal(weight, eight.params[name])


def collectives(config, sizes, micro_batches=2):
    mesh = mesh_of(*sizes)
    optimizer = make_optimizer(config, mesh)
    shapes = train_step.abstract(config, optimizer, mesh)
    place = sharding.batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((micro_batches, 8, 17), np.int32, sharding=place)
    step = train_step.make_train_step(config, optimizer, mesh)
    text = step.lower(shapes, tokens).compile().as_text()
    names = r"(all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)"
    found = re.findall(rf"= (\(.*?\)|\S+) {names}(?:-start)?\(", text)
    return sorted((kind, shape) for shape, kind in found)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 4, 1)])
def test_communication_does_not_grow_with_loops_or_micro_batches(sizes):
    def clean(found):  # the norms' own [K] vector is the only thing that K sizes
        return [(kind, re.sub(r"f32\[(1|12)\]", "f32[K]", shape)) for kind, shape in found]

    one, twelve = (clean(collectives(make_config(layers=1, loops=k), sizes)) for k in (1, 12))
    assert one == twelve and one
    assert clean(collectives(make_config(layers=1, loops=1), sizes, micro_batches=4)) == one


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (2, 2, 2), pytest.param((8, 1, 1), marks=pytest.mark.slow)]
)
def test_the_step_lowers_for_tpus_with_their_kernel(monkeypatch, sizes):
    """JAX itself refuses Mosaic kernels that the compiler would have to cut; no TPU is needed."""
    monkeypatch.setattr(
        attention_kernels, "attention_support", lambda _: AttentionSupport("tpu", "splash")
    )
    config = make_config(width=512, heads=4, kv_heads=2, seq_len=128, window_pattern="SL")
    mesh = mesh_of(*sizes)
    optimizer = make_optimizer(config, mesh)
    place = sharding.batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((1, 8, 129), np.int32, sharding=place)
    step = train_step.make_train_step(config, optimizer, mesh)
    traced = step.trace(train_step.abstract(config, optimizer, mesh), tokens)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_metrics_are_those_of_all_micro_batches():
    config, mesh = make_config(loss="STEP"), mesh_of(1, 1, 1)
    optimizer = make_optimizer(config)
    params = train_step.create(config, optimizer, mesh).params
    gradients = jax.jit(functools.partial(train_step.gradients, config, mesh))
    whole, together = gradients(params, TOKENS.reshape(1, 16, 17))
    parts, apart = gradients(params, TOKENS)
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[name], atol=1e-6)
    assert together["loop_losses"].shape == (3,) and together["norms"].shape == (3,)
    np.testing.assert_allclose(together["objective"], np.mean(together["loop_losses"]), rtol=1e-6)
    np.testing.assert_allclose(apart["norms"], together["norms"], rtol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_scores_of_several_loop_counts_equal_single_runs(sizes):
    config, mesh = make_config(), mesh_of(*sizes)
    optimizer = make_optimizer(config)
    current = train_step.create(config, optimizer, mesh)
    noise = functools.partial(jax.random.normal, jax.random.key(1))  # fresh loops change nothing
    current = dataclasses.replace(
        current, params=jax.tree.map(lambda w: w + 0.3 * noise(w.shape), current.params)
    )
    inputs, targets = TOKENS[0, :, :-1], TOKENS[0, :, 1:].copy()
    targets[0, :5] = -1
    sizes_of_tokens = np.arange(97, dtype=np.int32) % 4  # every fourth token has no bytes
    together = scoring.make_score_step(config.model, mesh, (1, 3, 5))
    nats, count = together(current.params, inputs, targets, sizes_of_tokens)
    assert count == np.where(targets < 0, 0, targets % 4).sum()
    for index, k in enumerate((1, 3, 5)):
        alone = scoring.make_score_step(config.model, mesh, (k,))
        np.testing.assert_allclose(
            nats[index], alone(current.params, inputs, targets, sizes_of_tokens)[0][0], rtol=1e-5
        )
    assert len(set(np.asarray(nats).tolist())) == 3


def test_meshes_that_cannot_cut_the_model_are_refused():
    config = make_config(heads=2)
    with pytest.raises(ConfigError, match="mesh.tensor=4 does not divide model.heads=2"):
        train_step.abstract(config, make_optimizer(config), mesh_of(1, 1, 4))
    config = make_config(width=36, heads=2)
    with pytest.raises(ConfigError, match="mesh.fsdp=8 does not divide .*choose a divisor of 36"):
        train_step.abstract(config, make_optimizer(config), mesh_of(1, 8, 1))


def test_the_step_compiles_once_whatever_happens_between_steps():
    config, mesh = make_config(), mesh_of(1, 1, 1)
    optimizer = make_optimizer(config)
    step = train_step.make_train_step(config, optimizer, mesh)
    current = train_step.create(config, optimizer, mesh)
    for seed in range(3):
        tokens = np.random.default_rng(seed).integers(0, 97, TOKENS.shape).astype(np.int32)
        current, _ = step(current, tokens)
        current = jax.tree.map(lambda x: x + 0, current)
    assert step._cache_size() == 1


def test_bfloat16_keeps_float32_masters_and_stays_close():
    config = make_config()
    rounded = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    exact, close = (losses(c, (1, 1, 1), steps=4) for c in (config, rounded))
    np.testing.assert_allclose(exact, close, rtol=0.01)
    current = train_step.create(rounded, make_optimizer(rounded), mesh_of(1, 1, 1))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(current)} == {"float32", "int32"}
