"""Against the formula, written out."""

import jax.numpy as jnp
import numpy as np

from looped_jax.model import probe, transformer
from tests.model.test_part import TOKENS, loud, with_parts


def test_keys_and_values_mix_in_those_of_the_token_before():
    config, plain = (
        with_parts(("kv_shift",), layers=1, loops=1).model,
        with_parts((), layers=1).model,
    )
    params = loud(config)
    recorder = probe.Recorder(("value",))
    ours = transformer.forward(config, params, TOKENS, probe=recorder).seen["value"][0, 0]
    base = transformer.forward(plain, params_of(plain, params), TOKENS, probe=recorder, loops=1)
    value = base.seen["value"][0, 0]
    share = params["blocks.0.parts.kv_shift.of_value"][:, None]
    before = jnp.concatenate([jnp.zeros_like(value[:, :1]), value[:, :-1]], axis=1)
    np.testing.assert_allclose(ours, (1 - share) * value + share * before, atol=1e-5)


def params_of(config, params):
    return {name: params[name] for name in transformer.weights(config)}
