"""Against the formula, written out, also beyond the trained loops."""

import numpy as np

from looped_jax.model import probe, transformer
from tests.model.parts.plain import mlp
from tests.model.test_part import TOKENS, loud, with_parts


def test_every_loop_has_gains_of_its_own_and_later_ones_the_last():
    config, plain = with_parts(("branch_gains",)).model, with_parts(()).model
    params = loud(config)
    of_attention, of_mlp = (
        1 + params[f"blocks.0.parts.branch_gains.of_{branch}"] for branch in ("attention", "mlp")
    )
    recorder = probe.Recorder(("start", "attention", "mlp"), layers=(0,))
    ours = transformer.forward(config, params, TOKENS, loops=5, probe=recorder).seen
    theirs = {name: params[name] for name in transformer.weights(plain)}
    theirs = transformer.forward(plain, theirs, TOKENS, loops=1, probe=recorder).seen
    # layer 0 of the first loop begins with the same stream in both
    np.testing.assert_allclose(
        ours["attention"][0], of_attention[0] * theirs["attention"][0], atol=1e-5
    )
    for loop in range(5):
        x = ours["start"][loop] + ours["attention"][loop, 0]
        wanted = of_mlp[min(loop, 2)] * mlp(params, x)
        np.testing.assert_allclose(ours["mlp"][loop, 0], wanted, atol=1e-4)
