"""Against the formula, written out."""

import dataclasses

import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.errors import ConfigError
from looped_jax.model import probe, transformer
from looped_jax.model.norm import rms_norm
from tests.model.test_part import TOKENS, check_decoding, loud, with_parts


@pytest.mark.parametrize("variant", ["FLT", "LT"])
def test_loops_start_from_embeddings_and_a_share_of_those_before(variant):
    config = with_parts(("smear",), variant=variant).model
    params = loud(config)
    x = np.asarray(rms_norm(params["embed"][TOKENS]))
    gate = 1 / (1 + np.exp(-(x[..., :24] @ params["parts.smear.gate"])))
    expected = x.copy()
    expected[:, 1:] += params["parts.smear.scale"] * gate[:, 1:] * x[:, :-1]
    starts = transformer.forward(config, params, TOKENS, probe=probe.Recorder(("start",))).seen
    np.testing.assert_allclose(starts["start"][0], expected, atol=1e-5)
    assert np.abs(expected - x).max() > 0.05


def test_behind_a_prelude_decoding_is_exact():
    check_decoding(with_parts(("prelude", "residual_scalars", "smear"), variant="LT").model, (2,))


def test_more_channels_than_the_model_has_are_refused():
    config = with_parts(("smear",)).model
    smear = dataclasses.replace(config.parts["smear"], channels=33)
    with pytest.raises(ConfigError, match="smear.channels=33 are more than model.width=32"):
        transformer.weights(dataclasses.replace(config, parts=Parts({"smear": smear})))
