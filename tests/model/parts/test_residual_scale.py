"""Against the formula, written out; K is the trained one, whatever number of loops is run."""

import dataclasses

import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.model import probe, transformer
from looped_jax.model.parts.residual_scale import ResidualScaleSettings
from tests.model.parts.plain import mlp
from tests.model.test_part import TOKENS, loud, with_parts


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1 / (3 * 2**0.5)),
        ({"factor": 2.0, "loops_power": 0.5}, 2 / 6**0.5),
        ({"loops_power": 0.0, "layers_power": 0.0}, 1),
    ],
)
def test_branches_are_scaled_by_trained_loops_and_layers(settings, scale):
    plain = with_parts(()).model  # K = 3, L = 2
    parts = Parts({"residual_scale": ResidualScaleSettings(on=True, **settings)})
    config = dataclasses.replace(plain, parts=parts)
    params = loud(plain)
    recorder = probe.Recorder(("start", "attention", "mlp"), layers=(0,))
    ours, theirs = (
        transformer.forward(c, params, TOKENS, loops=4, probe=recorder).seen
        for c in (config, plain)
    )
    # layer 0 of the first loop begins with the same stream in both
    np.testing.assert_allclose(ours["attention"][0], scale * theirs["attention"][0], atol=1e-5)
    for loop in range(4):
        x = ours["start"][loop] + ours["attention"][loop, 0]
        np.testing.assert_allclose(ours["mlp"][loop, 0], scale * mlp(params, x), atol=1e-4)
