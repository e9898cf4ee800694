"""Scalars of layers and the carried scale, against loops over layers that are written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.model import transformer
from looped_jax.model.attention_kernels import plain
from looped_jax.model.block import rope_tables
from looped_jax.model.full_pass import FullPass
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.base import Here
from tests.model.test_part import TOKENS, check_decoding, loud, with_parts


def with_scalars(*names, **scalars):
    config = with_parts(("residual_scalars", *names), variant="LT").model
    own = dataclasses.replace(config.parts["residual_scalars"], **scalars)
    return dataclasses.replace(
        config, parts=Parts(config.parts.changed() | {"residual_scalars": own})
    )


def written_out(config, params, loops):
    """Looped with renorm unless the scale is carried: the state after the last loop."""
    settings, blocks = config.parts["residual_scalars"], transformer.bind(config, params).blocks
    r, z = (params[f"parts.residual_scalars.{name}"] for name in ("residual", "input"))
    rope = rope_tables(jnp.arange(TOKENS.shape[1]), config.head_dim, jnp.float32)
    x = x0 = rms_norm(params["embed"][TOKENS])
    for loop in range(loops):
        own = min(loop, len(r) - 1)
        if loop and not config.parts["carried_scale"].on:
            x = rms_norm(x)
        for layer, block in enumerate(blocks):
            x = r[own, layer] * x
            if loop == 0 or settings.x0 == "every_visit":
                x = x + z[own, layer] * x0
            x = block(x, x, Here(history=FullPass(plain), rope=rope, layer=layer))
    return rms_norm(x)


@pytest.mark.parametrize(
    ("names", "scalars"),
    [
        (("carried_scale",), {}),
        (("carried_scale",), {"x0": "first_visit"}),
        ((), {}),
        (("carried_scale",), {"each_loop": True}),
    ],
    ids=["carry", "x0_first", "renorm", "each_loop"],
)
def test_loops_of_layers_written_out(names, scalars):
    config = with_scalars(*names, **scalars)
    params = loud(config)
    found = transformer.forward(config, params, TOKENS, loops=5, return_loops=(0, 2, 4)).hidden
    expected = [written_out(config, params, loops) for loops in (1, 3, 5)]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_scalars_start_on_a_line():
    config = dataclasses.replace(
        with_scalars(residual_first=1.15, residual_last=1.05, input_first=0.2, input_last=0.05),
        layers=3,
    )
    params = transformer.init_params(config, jax.random.key(0))
    np.testing.assert_allclose(params["parts.residual_scalars.residual"], [[1.15, 1.10, 1.05]])
    np.testing.assert_allclose(params["parts.residual_scalars.input"], [[0.2, 0.125, 0.05]])


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [((1.0, 0.1), (1.0, 0.1), 15.4), ((1.15, 0.20), (1.05, 0.05), 1.957e6)],
    ids=["seed", "head"],
)
def test_the_stream_grows_with_the_loops_as_the_scalars_say(first, last, expected):
    names = ("residual_first", "input_first", "residual_last", "input_last")
    scalars = dict(zip(names, (*first, *last), strict=True))
    config = dataclasses.replace(with_scalars("carried_scale", **scalars), layers=12, loops=12)
    params = transformer.init_params(config, jax.random.key(0))  # whose layers add nothing yet
    norms = transformer.forward(config, params, TOKENS).norms / config.width**0.5
    size, sizes = 1.0, []
    for _ in range(12):
        for r, z in np.linspace(first, last, 12):
            size = r * size + z
        sizes.append(size)
    np.testing.assert_allclose(norms, sizes, rtol=1e-4)
    np.testing.assert_allclose(norms[-1], expected, rtol=1e-3)


def test_with_a_set_for_each_loop_decoding_is_exact():
    check_decoding(with_scalars("carried_scale", each_loop=True, x0="first_visit"), (1, 5))


def test_in_bfloat16_the_carried_stream_stays_in_the_compute_type():
    config = dataclasses.replace(with_scalars("carried_scale"), dtype="bfloat16")
    states = transformer.forward(config, loud(config), TOKENS)
    assert states.hidden.dtype == jnp.bfloat16 and np.isfinite(states.norms).all()
