"""Against the formula, written out, also beyond the trained loops."""

import numpy as np

from looped_jax.model import probe, transformer
from tests.model.test_part import TOKENS, loud, with_parts


def test_every_loop_starts_with_its_gain_and_later_ones_with_the_last():
    config = with_parts(("loop_gains",)).model
    params = loud(config)
    e = params["embed"][TOKENS]
    start = e / np.sqrt(np.mean(e * e, axis=-1, keepdims=True))
    recorder = probe.Recorder(("start",))
    seen = transformer.forward(config, params, TOKENS, loops=5, probe=recorder).seen["start"]
    for loop in range(5):
        gain = 1 + params["parts.loop_gains.gains"][min(loop, 2)]
        np.testing.assert_allclose(seen[loop], start * gain, atol=1e-5)
