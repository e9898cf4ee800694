"""Against the plain model, run loop by loop."""

import numpy as np
import pytest

from looped_jax.model import transformer
from tests.model.parts.plain import next_state, norm
from tests.model.test_part import TOKENS, loud, with_parts


@pytest.mark.parametrize("variant", ["FLT", "LT"])
def test_a_state_keeps_a_share_of_the_one_before(variant):
    config, plain = (
        with_parts(names, layers=1, variant=variant).model for names in (("damping",), ())
    )
    params = loud(config)
    ours = transformer.forward(config, params, TOKENS, loops=4, return_loops=(0, 1, 2, 3)).hidden
    state = next_state(plain, params, None, 0)
    np.testing.assert_allclose(ours[0], state, atol=1e-5)
    for loop in range(1, 4):
        state = norm(0.5 * next_state(plain, params, state, loop) + 0.5 * state)
        np.testing.assert_allclose(ours[loop], state, atol=1e-4)
