"""Against streams that a probe has seen: x − λ · m, normed, for every loop count that is read."""

import dataclasses

import jax
import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.model import probe, transformer
from looped_jax.model.norm import rms_norm
from tests.model.test_part import TOKENS, check_decoding, loud, with_parts

COUNTS = (1, 2, 3, 5)


def with_backout(middle="of_all_visits", names=("backout",), **model):
    config = with_parts(names, **model).model
    own = dataclasses.replace(config.parts["backout"], middle=middle)
    return dataclasses.replace(config, parts=Parts(config.parts.changed() | {"backout": own}))


@pytest.mark.parametrize("middle", ["of_all_visits", "of_last_loop"])
@pytest.mark.parametrize(("loops", "layers"), [(1, 3), (2, 3), (3, 3), (4, 1)])
def test_the_stream_half_way_is_taken_out(loops, layers, middle):
    config = with_backout(middle, loops=loops, layers=layers)
    params = loud(config)
    plain = {n: w for n, w in params.items() if "parts" not in n}
    streams = transformer.forward(
        dataclasses.replace(config, parts=Parts()), plain, TOKENS, loops=5,
        probe=probe.Recorder(("block",)),
    ).seen["block"]  # fmt: skip
    found = transformer.forward(
        config, params, TOKENS, loops=5, return_loops=tuple(k - 1 for k in COUNTS)
    ).hidden
    for ours, count in zip(found, COUNTS, strict=True):
        loop, layer = divmod(loops * layers // 2, layers)
        if middle == "of_last_loop":
            loop, layer = count - 1, layers // 2
        taken = streams[loop, layer] if loop < count else 0
        expected = rms_norm(streams[count - 1, -1] - params["parts.backout.scale"] * taken)
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_of_one_loop_count_or_of_several_it_is_the_same():
    config = with_backout(loops=3)
    params = loud(config)
    alone = transformer.forward(config, params, TOKENS).hidden
    among = transformer.forward(config, params, TOKENS, return_loops=(0, 2)).hidden
    np.testing.assert_allclose(alone[0], among[1], atol=1e-5)


@pytest.mark.parametrize("middle", ["of_all_visits", "of_last_loop"])
def test_before_a_coda_decoding_is_exact(middle):
    config = with_backout(middle, ("backout", "carried_scale", "coda"), variant="LT")
    check_decoding(config, (1, 4))


def test_it_starts_as_told():
    params = transformer.init_params(with_backout(), jax.random.key(0))
    np.testing.assert_allclose(params["parts.backout.scale"], [0.2])
