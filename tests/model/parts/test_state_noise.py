"""Against the plain model, loop by loop, with the noise taken from where it is drawn."""

import dataclasses

import jax
import numpy as np

from looped_jax.config.options import Parts
from looped_jax.config.registry import PARTS
from looped_jax.model import transformer
from looped_jax.model.random_numbers import RandomNumbers
from tests.model.parts.plain import next_state, norm
from tests.model.test_part import TOKENS, loud, with_parts

SEEDS = np.array([7, 11], np.uint32)


def config_of(std):
    own = PARTS["state_noise"].Settings(on=True, std=std)
    return dataclasses.replace(with_parts((), layers=1).model, parts=Parts({"state_noise": own}))


def test_every_loop_leaves_a_state_with_noise_in_training():
    config, plain = config_of(0.5), with_parts((), layers=1).model
    params = loud(config)
    ours = transformer.forward(
        config, params, TOKENS, loops=4, return_loops=(0, 1, 2, 3), seeds=SEEDS
    ).hidden
    numbers, state, drawn = RandomNumbers.of(SEEDS, np.arange(12)), None, []
    for loop in range(4):
        noise = numbers.draw(
            jax.random.normal, (32,), place="loop_end.state_noise", loop=np.int32(loop), layer=None
        )
        drawn.append(np.asarray(noise))
        state = norm(next_state(plain, params, state, loop) + 0.5 * drawn[-1])
        np.testing.assert_allclose(ours[loop], state, atol=1e-4)
    drawn = np.stack(drawn)
    assert abs(drawn.std() - 1) < 0.05 and np.unique(drawn).size == drawn.size


def test_it_is_not_there_without_seeds():
    config, plain = config_of(0.5), with_parts((), layers=1).model
    params = loud(config)
    ours, theirs = (transformer.forward(c, params, TOKENS).hidden for c in (config, plain))
    np.testing.assert_array_equal(ours, theirs)
