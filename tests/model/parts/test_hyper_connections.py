"""Against streams that are mixed in NumPy between single loops of the plain model."""

import dataclasses

import jax
import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.errors import ArgumentError
from looped_jax.inference.inspection import Edit
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.model import transformer
from looped_jax.model.parts.hyper_connections import HyperConnectionsSettings
from tests.model.parts.plain import next_state, norm
from tests.model.test_part import TOKENS, loud, with_parts


@pytest.mark.parametrize(("variant", "each_loop"), [("FLT", True), ("LT", False)])
def test_streams_are_mixed_at_the_end_of_every_loop(variant, each_loop):
    plain = with_parts((), layers=1, variant=variant).model
    settings = HyperConnectionsSettings(on=True, streams=3, each_loop=each_loop)
    config = dataclasses.replace(plain, parts=Parts({"hyper_connections": settings}))
    params = loud(config)
    ours = transformer.forward(config, params, TOKENS, loops=5, return_loops=(0, 1, 2, 3, 4)).hidden
    read, write, mix = (
        np.asarray(params[f"parts.hyper_connections.{name}"]) for name in ("read", "write", "mix")
    )
    assert len(read) == (3 if each_loop else 1)
    streams = np.stack([norm(params["embed"][TOKENS])] * 3, axis=-2)  # [B, T, n, D]
    state = None
    for loop in range(5):
        own = min(loop, len(read) - 1)  # beyond the trained loops the last one's
        out = next_state(plain, params, state, loop)
        streams = np.einsum("mn,btnd->btmd", mix[own], streams)
        streams = streams + write[own][:, None] * norm(out)[..., None, :]
        state = norm(np.einsum("n,btnd->btd", read[own], streams))
        np.testing.assert_allclose(ours[loop], state, atol=1e-4)


def test_fresh_streams_are_running_means_of_the_states():
    config = with_parts(("hyper_connections",)).model
    write, mix = (
        transformer.init_params(config, jax.random.key(0))[f"parts.hyper_connections.{name}"][0]
        for name in ("write", "mix")
    )
    np.testing.assert_allclose(write + mix.sum(1), 1)
    assert len(set(np.diag(mix).tolist())) == len(mix)  # alike, they would be updated alike


def test_a_state_alone_does_not_go_on():
    config = with_parts(("hyper_connections",))
    params = transformer.init_params(config.model, jax.random.key(0))
    model, state = TrainedModel(config, params, None, step=0), np.zeros((*TOKENS.shape, 32))
    for pass_on in (
        lambda: model.run(TOKENS, start=(1, state)),
        lambda: transformer.forward(config.model, params, TOKENS, start=state, done=1),
    ):
        with pytest.raises(ArgumentError, match="start is a state alone, and hyper_connections"):
            pass_on()
    with pytest.raises(ArgumentError, match="edit of 'state': hyper_connections.*edit 'block'"):
        model.run(TOKENS, edit=Edit("state", 0.0, loop=1))
    model.run(TOKENS, edit=Edit("block", 0.0, loop=1, layer=1))
