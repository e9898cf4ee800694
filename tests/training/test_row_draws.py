"""What rows of training are given: what it depends on, and that nothing is added without need."""

import dataclasses

import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.config.registry import PARTS
from looped_jax.runtime.sharding import Shard
from looped_jax.training.row_draws import RowDraws
from tests.training.test_loop_sampler import config_of

NOISY = {"parts": Parts({"state_noise": PARTS["state_noise"].Settings(on=True)})}
ROWS = np.zeros((8, 9), np.int32)


def test_a_seed_depends_on_the_runs_seed_the_step_and_the_row_alone():
    few, many = (RowDraws(config_of(rows=n, model=NOISY)) for n in (8, 32))
    np.testing.assert_array_equal(few.seeds(5), many.seeds(5)[:8])
    assert few.seeds(5).dtype == np.uint32 and len(set(many.seeds(5))) == 32
    assert not set(few.seeds(5)) & set(few.seeds(6))
    config = config_of(model=NOISY)
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    assert not set(RowDraws(other).seeds(5)) & set(few.seeds(5))


def test_processes_have_the_rows_of_their_shard():
    sampling = {"distribution": "poisson", "per": "sequence", "backward_loops": 3}
    whole = RowDraws(config_of(rows=16, model=NOISY, **sampling)).columns(5)
    assert whole.keys() == {"loops", "backward_loops", "seeds"}
    halves = [
        RowDraws(config_of(rows=16, model=NOISY, **sampling), Shard(i, 2)).join(ROWS, 5)
        for i in (0, 1)
    ]
    assert halves[0]["inputs"].shape == halves[0]["targets"].shape == (8, 8)
    for name, column in whole.items():
        together = np.stack([half[name] for half in halves], axis=1).reshape(-1)
        np.testing.assert_array_equal(together, column)


@pytest.mark.parametrize(
    ("model", "added"),
    [({}, set()), (NOISY, {"seeds"}), ({"loss": "RANDOM"}, {"seeds"})],
)
def test_a_batch_gets_what_is_drawn_and_else_passes_as_it_is(model, added):
    draws = RowDraws(config_of(model=model))
    shapes = {"inputs": 1, "targets": 2}
    if not added:
        assert draws.join(ROWS, 1) is ROWS and draws.row_shapes(shapes) is shapes
    else:
        assert (
            draws.join(ROWS, 1).keys() == draws.row_shapes(shapes).keys() == shapes.keys() | added
        )
