"""What a model draws in training: the same on any mesh, in any split, and when it is recomputed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from looped_jax.model import random_numbers, transformer
from looped_jax.runtime import sharding
from looped_jax.training import train_step
from tests.model.test_part import batch_of, loud, with_parts
from tests.model.test_sampled_loops import SEQUENCES, config_of, steps_of

PARTS = ("state_init", "state_noise")


@pytest.mark.parametrize(
    "settings", [{"parts": PARTS, "loss": "RANDOM"}, {"parts": PARTS, **SEQUENCES}]
)
def test_meshes_and_micro_batches_draw_the_same(settings):
    config = config_of(**settings)
    alone, shared = (steps_of(config, *of, steps=3) for of in (((1, 1, 1), 1), ((2, 2, 2), 2)))
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_allclose(other["objective"], one["objective"], rtol=2e-6)
        np.testing.assert_allclose(other["loop_losses"], one["loop_losses"], rtol=5e-6)


def test_a_step_draws_anew_and_a_loop_that_is_computed_again_the_same():
    config = with_parts(PARTS, layers=1)
    params, found = loud(config.model, 0.1), {}
    for remat in ("loop", "none"):
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        program = jax.jit(functools.partial(train_step.gradients, other, sharding.one_device()))
        found[remat] = [program(params, batch_of(config, step)) for step in (1, 1, 2)]
    first, again, second = (float(metrics["loss"]) for _, metrics in found["loop"])
    assert first == again != second
    for (gradients, _), (kept, _) in zip(*found.values(), strict=True):
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, kept[name], atol=1e-5, err_msg=name)


def test_nothing_is_drawn_where_nothing_says_so():
    plain, drawn = with_parts(()).model, with_parts(("state_init",)).model
    objective = dataclasses.replace(plain, loss="RANDOM")
    for config, model, training in (
        (plain, False, False),
        (drawn, True, True),
        (objective, False, True),
    ):
        assert random_numbers.in_model(config) == model
        assert random_numbers.in_training(config) == training
    shapes = transformer.init_shapes(plain)
    tokens = jax.ShapeDtypeStruct((2, 12), np.int32)
    program = jax.make_jaxpr(functools.partial(transformer.forward, plain))(shapes, tokens)
    assert "random" not in str(program) and "threefry" not in str(program)
