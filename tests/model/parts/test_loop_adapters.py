"""Against the formula, written out, also beyond the trained loops."""

import numpy as np

from looped_jax.model import probe, transformer
from tests.model.parts.plain import mlp, params_of
from tests.model.test_part import TOKENS, loud, with_parts


def test_every_loop_adapts_what_branches_add_and_later_ones_as_the_last():
    config, plain = (with_parts(names, layers=1).model for names in (("loop_adapters",), ()))
    params = loud(config)
    recorder = probe.Recorder(("start", "attention", "mlp"))
    ours, theirs = (
        transformer.forward(c, params_of(c, params), TOKENS, loops=4, probe=recorder).seen
        for c in (config, plain)
    )

    def adapted(branch, loop, out):
        down, up = (
            params[f"blocks.0.parts.loop_adapters.of_{branch}.{name}"][min(loop, 2)]
            for name in ("down", "up")
        )
        return out + np.maximum(out @ down, 0) @ up

    np.testing.assert_allclose(
        ours["attention"][0, 0], adapted("attention", 0, theirs["attention"][0, 0]), atol=1e-4
    )
    for loop in range(4):
        x = ours["start"][loop] + ours["attention"][loop, 0]
        found = adapted("mlp", loop, mlp(params, x))
        np.testing.assert_allclose(ours["mlp"][loop, 0], found, atol=1e-3, rtol=1e-4)
