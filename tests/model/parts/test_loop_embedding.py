"""Against the formula, written out, also beyond the trained loops."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.model import probe, sampled_loops, transformer
from looped_jax.model.parts.loop_embedding import LoopEmbeddingSettings, sinusoids
from tests.model.parts.plain import norm
from tests.model.test_part import TOKENS, check_decoding, loud, with_parts


def starts(config, params, loops=5):
    """The stream at the start of every loop."""
    recorder = probe.Recorder(("start",))
    return transformer.forward(config, params, TOKENS, loops=loops, probe=recorder).seen["start"]


def with_sinusoids(**settings):
    parts = Parts({"loop_embedding": LoopEmbeddingSettings(on=True, kind="sinusoidal", **settings)})
    return dataclasses.replace(with_parts(()).model, parts=parts)


def test_every_loop_starts_with_its_vector_and_later_ones_with_the_last():
    config = with_parts(("loop_embedding",)).model
    params = loud(config)
    start = norm(params["embed"][TOKENS])
    seen = starts(config, params)
    for loop in range(5):
        vector = params["parts.loop_embedding.vectors"][min(loop, 2)]
        np.testing.assert_allclose(seen[loop], start + vector, atol=1e-5)


@pytest.mark.parametrize("positions", [False, True])
def test_or_with_sinusoids_that_go_on(positions):
    config = with_sinusoids(positions=positions)
    params = loud(config)

    def s(n):
        rate = 10_000.0 ** (-np.arange(0, 32, 2) / 32)
        return np.concatenate([np.sin(n * rate), np.cos(n * rate)])

    start = norm(params["embed"][TOKENS])
    start = start + positions * np.stack([s(t) for t in range(12)])
    for loop, found in enumerate(starts(config, params)):
        np.testing.assert_allclose(found, start + s(loop + 1), atol=1e-5)
    assert not [name for name in transformer.weights(config) if "loop_embedding" in name]


def test_sinusoids_are_as_wide_as_they_should_be():
    assert sinusoids(jnp.arange(4), 7).shape == (4, 7)


def test_decoding_knows_the_position():
    check_decoding(with_sinusoids(positions=True))


def test_rows_may_be_in_different_loops():
    config = with_sinusoids(positions=True)
    params = loud(config)
    counts = sampled_loops.Counts(jnp.array([3, 1]), jnp.array(3), jnp.array(2))
    found = sampled_loops.forward(config, params, TOKENS, counts, longest=2).hidden[0]
    for row, loops in enumerate((3, 1)):
        alone = transformer.forward(config, params, TOKENS[row : row + 1], loops=loops).hidden[0]
        np.testing.assert_allclose(found[row], alone[0], atol=1e-5)
