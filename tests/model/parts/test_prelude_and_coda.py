"""Against a deeper plain model of one loop: its first layers, its middle and its last."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.model import transformer
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.coda import CodaSettings
from looped_jax.model.parts.prelude import PreludeSettings
from looped_jax.model.parts.sandwich_norm import SandwichNormSettings
from looped_jax.planning import memory
from tests.model.parts.plain import next_state, params_of
from tests.model.test_part import TOKENS, loud, with_parts


def layer(config, params, source, x):
    """A block of `params`, whose names begin with `source`, as the one layer of a plain model."""
    norms = {"sandwich_norm": config.parts["sandwich_norm"]}
    one = dataclasses.replace(config, layers=1, variant="LT", parts=Parts(norms))
    own = params_of(
        one,
        {"embed": params["embed"], "head": params["head"]}
        | {
            name.replace(source, "blocks.0"): array
            for name, array in params.items()
            if name.startswith(f"{source}.")
        },
    )
    return next_state(one, own, x, 1)  # norm of x after the layer; LT goes on with x


@pytest.mark.parametrize("norms", [False, True])
def test_the_embedding_that_loops_read_and_the_state_that_the_head_reads(norms):
    sandwich = {"sandwich_norm": SandwichNormSettings(on=norms, after="sum")}
    plain = with_parts((), layers=1).model
    plain = dataclasses.replace(plain, parts=Parts(sandwich))
    config = dataclasses.replace(
        plain,
        parts=Parts(
            {"prelude": PreludeSettings(on=True, layers=1), "coda": CodaSettings(on=True, layers=1)}
            | sandwich
        ),
    )
    params = loud(config)
    ours = transformer.forward(config, params, TOKENS, return_loops=(0, 2)).hidden
    rows = params["embed"][TOKENS]
    e = layer(config, params, "parts.prelude.layers.blocks.0", rows)
    # a vocabulary of places: the plain model reads e, which rules normalise, as its embedding
    of_places = params | {"embed": np.asarray(e).reshape(-1, e.shape[-1])}
    places = np.arange(TOKENS.size).reshape(TOKENS.shape)
    states = transformer.forward(
        plain, params_of(plain, of_places), places, return_loops=(0, 2)
    ).hidden
    for found, state in zip(ours, states, strict=True):
        wanted = layer(config, params, "parts.coda.layers.blocks.0", state)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        np.testing.assert_allclose(rms_norm(found), found, atol=1e-5)


def test_of_the_parts_of_layers_only_those_that_say_so_are_in_them():
    names = transformer.weights(with_parts(("prelude", "sandwich_norm", "kv_shift")).model)
    own = {
        name.split(".parts.")[1]
        for name in names
        if name.startswith("parts.prelude") and ".parts." in name
    }
    assert own == {"sandwich_norm.of_attention", "sandwich_norm.of_mlp"}


def test_the_backward_pass_recomputes_them_as_it_does_loops():
    """Of a layer that runs once, `loop` keeps the stream that it begins with, alone."""
    around = with_parts(("prelude", "coda")).model
    params = loud(around)

    def gradients(remat):
        config = dataclasses.replace(around, remat=remat)
        return jax.grad(
            lambda params: jnp.sum(jnp.sin(transformer.forward(config, params, TOKENS).hidden))
        )(params)

    wanted = gradients("none")
    for remat in ("loop", "dots"):
        found = gradients(remat)
        for name, gradient in wanted.items():
            apart = np.linalg.norm(found[name] - gradient)
            assert apart <= 1e-5 * np.linalg.norm(gradient), name

    def kept(remat, parts):
        config = dataclasses.replace(with_parts(parts).model, remat=remat)
        return memory.saved_residuals(config, 1, "xla")

    def added(remat):
        return kept(remat, ("prelude", "coda")) - kept(remat, ())

    stream = 4 * around.seq_len * around.width
    assert 4 * stream <= added("loop") < 8 * stream  # two layers before, two after, the last norm
    assert added("loop") < added("dots") / 4 < added("none") / 4
