"""model.gather="layer": the numbers of "step", from weights that are nowhere kept whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from looped_jax.config.options import Parts
from looped_jax.config.registry import LOOP_RULES, PARTS
from looped_jax.config.settings import LoopSamplingConfig
from looped_jax.config.transformer_settings import NormSettings
from looped_jax.errors import ArgumentError
from looped_jax.model import transformer
from looped_jax.model.cut_weight import CutWeight
from looped_jax.model.linear import linear
from looped_jax.planning.communication import equations
from looped_jax.training import train_step
from looped_jax.training.row_draws import RowDraws
from tests.training.test_train_step import TOKENS, make_config, mesh_of

UNLOOPED = Parts({n: PARTS[n].Settings(on=True, layers=1) for n in ("prelude", "coda")})
GATHERS = ("step", "layer")
SMALL = {"layers": 2, "loops": 2, "width": 32, "heads": 4}


def with_gather(gather, **model):
    return make_config(**SMALL | {"gather": gather} | model)


def gradients(config, sizes, batch=TOKENS):
    """Of weights without zeros, as numpy arrays, and metrics."""
    mesh, noise = mesh_of(*sizes), functools.partial(jax.random.normal, jax.random.key(1))
    params = transformer.init_params(config.model, jax.random.key(0))
    params = jax.tree.map(lambda w: w + 0.3 * noise(w.shape), params)
    params = jax.device_put(params, transformer.shardings(config.model, mesh))
    found = jax.jit(functools.partial(train_step.gradients, config, mesh))(params, batch)
    return jax.device_get(found)


def assert_alike(settings, sizes, **sampling):
    batch, (step, layer) = TOKENS, (with_gather(gather, **settings) for gather in GATHERS)
    if sampling:
        drawn = {"loop_sampling": LoopSamplingConfig(**sampling), "tokens_per_step": 16 * 16}
        step, layer = (
            dataclasses.replace(c, train=dataclasses.replace(c.train, **drawn))
            for c in (step, layer)
        )
        rows = RowDraws(step).join(TOKENS.reshape(16, 17), 1)
        batch = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), rows)
    (theirs, told), (ours, also) = (gradients(c, sizes, batch) for c in (step, layer))
    np.testing.assert_allclose(also["loop_losses"], told["loop_losses"], rtol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(ours[name], gradient, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "variant", "settings"),
    [
        ((2, 2, 2), "FLT", {"remat": "loop", "parts": UNLOOPED, "loss": "STEP"}),
        ((1, 4, 1), "FLT_res", {"remat": "dots", "attention": "mla", "latent_rank": 8}),
        ((2, 4, 1), "LT_ia", {"remat": "none", "embedding": "tied", "parts": UNLOOPED}),
        ((1, 2, 2), "LT_i", {"remat": "loop", "embedding": "factorised", "loss_chunk": 16}),
        ((1, 4, 1), "LT", {"remat": "none", "kv_heads": 2}),
        ((2, 2, 1), "diagonal", {"remat": "offload"}),
        ((1, 2, 1), "linear", {"parts": Parts({"biases": PARTS["biases"].Settings(on=True)})}),
        ((1, 2, 1), "gate", {"norm": NormSettings(gain=True)}),
    ],
)  # fmt: skip
def test_losses_and_gradients_are_those_of_whole_weights(sizes, variant, settings):
    assert_alike({"variant": variant} | settings, sizes)


def test_the_rules_above_are_all():
    rows = test_losses_and_gradients_are_those_of_whole_weights.pytestmark[0].args[1]
    assert {variant for _, variant, _ in rows} == set(LOOP_RULES)


@pytest.mark.parametrize("per", ["step", "sequence"])
def test_where_loops_are_drawn_too(per):
    drawn = {"distribution": "poisson", "per": per, "backward_loops": 2}
    assert_alike({"loops": 3}, (2, 2, 1), **drawn)


def test_in_bfloat16_they_stay_close():
    """The same weights are rounded, before they travel; sums over devices are in float32."""
    found = []
    for config in map(with_gather, GATHERS):
        rounded = dataclasses.replace(config.model, dtype="bfloat16")
        found.append(gradients(dataclasses.replace(config, model=rounded), (1, 4, 1)))
    step, layer = found
    np.testing.assert_allclose(layer[1]["loss"], step[1]["loss"], rtol=1e-3)
    for name, gradient in step[0].items():
        apart = np.linalg.norm(layer[0][name] - gradient)
        assert apart <= 0.01 * np.linalg.norm(gradient), name


def traced(config, sizes):
    """Every equation of the program of gradients, with the number of scans around it."""
    mesh = mesh_of(*sizes)
    shapes = transformer.init_shapes(config.model)
    program = jax.make_jaxpr(functools.partial(train_step.gradients, config, mesh))(shapes, TOKENS)
    return [(equation, depth) for equation, _, _, depth in equations(program.jaxpr)]


def talk(config, sizes, kind):
    return [d for e, d in traced(config, sizes) if e.primitive.name == kind]


@pytest.mark.parametrize("remat", ["loop", "dots", "none"])
def test_products_gather_and_scatter_what_they_use_and_no_others(remat):
    """Depth 1 is in a micro-batch, depth 2 in a loop; 6 matrices of each of 2 layers.

    Not of FLT, whose first layer has the same keys and values in every loop, made before them.
    """
    config = with_gather("layer", remat=remat, parts=UNLOOPED, variant="LT")
    gathers, scatters = (talk(config, (1, 4, 1), k) for k in ("all_gather", "reduce_scatter"))
    # A layer that runs once need not make its last product again: where the next starts is kept.
    once, looped = {"loop": (10, 12), "dots": (0, 0), "none": (0, 0)}[remat]
    # Forward and backward; beside the loops a layer before, one after, embedding and head.
    assert sorted(gathers) == [1] * (2 * 12 + once + 2) + [2] * (2 * 12 + looped)
    assert sorted(scatters) == [1] * (12 + 2) + [2] * 12


def test_a_step_that_gathers_once_talks_in_no_loop():
    config = with_gather("step")
    for kind in ("all_gather", "reduce_scatter"):
        found = talk(config, (1, 4, 1), kind)
        assert found and set(found) == {0}


def large(config):
    """Arrays as large as a matrix of the MLP that a scan inside of a micro-batch keeps or sums."""
    return [
        v.aval.shape
        for equation, depth in traced(config, (1, 8, 1))
        if equation.primitive.name == "scan" and depth
        for v in equation.outvars
        if v.aval.shape[-2:] in ((64, 256), (256, 64))
    ]


@pytest.mark.parametrize("remat", ["loop", "dots", "none"])
def test_no_loop_keeps_or_sums_whole_weights(remat):
    sizes = {"remat": remat, "width": 64, "heads": 8}
    assert large(with_gather("step", **sizes))
    assert not large(with_gather("layer", **sizes))


@pytest.mark.parametrize(
    ("use", "named"),
    [
        (lambda x, w: x @ w, "product by @"), (lambda x, w: x * w.T, "T"),
        (lambda x, w: w[0], r"\[0\]"), (lambda x, w: w.reshape(2, 2, -1), r"reshape"),
        (lambda x, w: w.astype("bfloat16"), "astype"), (lambda x, w: x + w, "sum by +"),
    ],
)  # fmt: skip
def test_other_uses_of_a_cut_matrix_are_refused(use, named):
    def local(x, piece):
        weight = CutWeight(piece, 0, "fsdp")
        assert weight.shape == (4, 8) and len(weight[...]) == 4
        linear(x, weight)
        return use(x, weight)

    program = jax.shard_map(
        local, mesh=mesh_of(1, 2, 1), in_specs=(P(), P("fsdp")), out_specs=P(), check_vma=False
    )
    with pytest.raises(ArgumentError, match=f"model.gather=layer: .* its {named}.* was asked for;"):
        jax.eval_shape(program, jnp.ones((3, 4)), jnp.ones((4, 8)))
