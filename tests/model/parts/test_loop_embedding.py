"""Against the formula, written out, also beyond the trained loops."""

import numpy as np

from looped_jax.model import probe, transformer
from tests.model.parts.plain import norm
from tests.model.test_part import TOKENS, loud, with_parts


def test_every_loop_starts_with_its_vector_and_later_ones_with_the_last():
    config = with_parts(("loop_embedding",)).model
    params = loud(config)
    start = norm(params["embed"][TOKENS])
    recorder = probe.Recorder(("start",))
    seen = transformer.forward(config, params, TOKENS, loops=5, probe=recorder).seen["start"]
    for loop in range(5):
        vector = params["parts.loop_embedding.vectors"][min(loop, 2)]
        np.testing.assert_allclose(seen[loop], start + vector, atol=1e-5)
