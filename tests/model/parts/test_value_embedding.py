"""Against the formula, written out; the table is looked up once, outside of the loops."""

import dataclasses

import jax
import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.errors import ConfigError
from looped_jax.model import probe, transformer
from looped_jax.model.norm import rms_norm
from tests.model.test_part import TOKENS, check_decoding, check_gradients, loud, with_parts

NAME = "value_embedding"


def with_tables(depth=1, loops=1, **settings):
    config = with_parts((NAME,), layers=depth, loops=loops, attention="mla", latent_rank=8)
    own = dataclasses.replace(config.model.parts[NAME], **settings)
    model = dataclasses.replace(config.model, parts=Parts({NAME: own}))
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize("gated", [False, True])
def test_values_have_the_token_s_own_row_added(gated):
    config = with_tables(gate=gated, gate_scale=3.0, gate_channels=12).model
    plain = dataclasses.replace(config, parts=Parts())
    params = loud(config)
    recorder = probe.Recorder(("value",))
    base = {name: params[name] for name in transformer.weights(plain)}
    ours, theirs = (
        transformer.forward(c, p, TOKENS, probe=recorder).seen["value"][0, 0]
        for c, p in ((config, params), (plain, base))
    )
    rows = params[f"blocks.0.parts.{NAME}.table"][TOKENS].reshape(theirs.shape)
    if gated:  # by the layer's input, not by its latent
        x = rms_norm(rms_norm(params["embed"][TOKENS]))[..., :12]
        gate = 3 / (1 + np.exp(-(x @ params[f"blocks.0.parts.{NAME}.gate"])))
        rows = gate[..., None] * rows
    np.testing.assert_allclose(ours, theirs + rows, atol=1e-5)


def test_the_table_is_read_once_whatever_the_loops():
    config = with_parts((NAME,)).model

    def program(params):
        return transformer.forward(config, params, TOKENS, loops=7).hidden

    loop = next(
        e for e in jax.make_jaxpr(program)(transformer.init_shapes(config)).eqns
        if e.primitive.name == "scan"
    )  # fmt: skip
    assert "gather" not in str(loop.params["jaxpr"])


@pytest.mark.parametrize(("layers", "having"), [(4, {1, 3}), (3, {0, 2}), (1, {0})])
def test_alternate_layers_have_a_table_the_last_among_them(layers, having):
    weights = transformer.weights(with_tables(layers, loops=1, layers="alternate", gate=True).model)
    found = {int(name.split(".")[1]) for name in weights if NAME in name}
    assert found == having and len([n for n in weights if NAME in n]) == 2 * len(having)


def test_tables_and_gates_start_as_told():
    model = with_tables(gate=True, table_scale=1.0, gate_bound=0.02).model
    params = transformer.init_params(model, jax.random.key(0))
    table, gate = (params[f"blocks.0.parts.{NAME}.{name}"] for name in ("table", "gate"))
    bound = (3 / 32) ** 0.5
    assert 0.98 * bound < table.max() <= bound and -bound <= table.min() < -0.98 * bound
    assert 0 <= gate.min() < 0.002 and 0.018 < gate.max() <= 0.02


def test_with_gates_in_alternate_layers_decoding_is_exact_and_meshes_change_nothing():
    config = with_tables(3, 2, layers="alternate", gate=True)
    check_decoding(config.model, (2,))
    check_gradients(config)


def test_a_gate_of_more_channels_than_the_model_has_is_refused():
    with pytest.raises(ConfigError, match="gate_channels=33 are more than model.width=32"):
        transformer.weights(with_tables(gate=True, gate_channels=33).model)
