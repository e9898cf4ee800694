"""Against the formula, written out; the table is looked up once, outside of the loops."""

import jax
import numpy as np

from looped_jax.model import probe, transformer
from tests.model.test_part import TOKENS, loud, with_parts


def test_values_have_the_token_s_own_row_added():
    config, plain = (
        with_parts(names, layers=1, loops=1).model for names in (("value_embedding",), ())
    )
    params = loud(config)
    recorder = probe.Recorder(("value",))
    base = {name: params[name] for name in transformer.weights(plain)}
    ours, theirs = (
        transformer.forward(c, p, TOKENS, probe=recorder).seen["value"][0, 0]
        for c, p in ((config, params), (plain, base))
    )
    rows = params["blocks.0.parts.value_embedding.table"][TOKENS].reshape(theirs.shape)
    np.testing.assert_allclose(ours, theirs + rows, atol=1e-5)


def test_the_table_is_read_once_whatever_the_loops():
    config = with_parts(("value_embedding",)).model

    def program(params):
        return transformer.forward(config, params, TOKENS, loops=7).hidden

    loop = next(
        e for e in jax.make_jaxpr(program)(transformer.init_shapes(config)).eqns
        if e.primitive.name == "scan"
    )  # fmt: skip
    assert "gather" not in str(loop.params["jaxpr"])
