"""Against the formula, written out; after each branch, or after its sum with the stream."""

import dataclasses

import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.model import probe, transformer
from looped_jax.model.parts.sandwich_norm import SandwichNormSettings
from tests.model.parts.plain import mlp, norm, params_of
from tests.model.test_part import TOKENS, loud, with_parts


@pytest.mark.parametrize("after", ["branch", "sum"])
def test_what_follows_a_branch_is_normalised(after):
    plain = with_parts((), layers=1, loops=1).model
    parts = Parts({"sandwich_norm": SandwichNormSettings(on=True, after=after)})
    config = dataclasses.replace(plain, parts=parts)
    params = loud(config)
    of_attention, of_mlp = (
        params[f"blocks.0.parts.sandwich_norm.of_{name}"] for name in ("attention", "mlp")
    )
    recorder = probe.Recorder(("start", "attention", "block"))
    ours, theirs = (
        transformer.forward(c, params_of(c, params), TOKENS, probe=recorder).seen
        for c in (config, plain)
    )
    x, branch = ours["start"][0], theirs["attention"][0, 0]
    if after == "branch":
        x = x + norm(branch) * of_attention
        x = x + norm(mlp(params, x)) * of_mlp
    else:
        x = norm(x + branch) * of_attention
        x = norm(x + mlp(params, x)) * of_mlp
    np.testing.assert_allclose(ours["block"][0, 0], x, atol=1e-4)
