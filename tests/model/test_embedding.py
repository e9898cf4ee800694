"""What has to hold for every embedding, and the formula of each."""

import dataclasses

import jax
import numpy as np
import pytest

from looped_jax.config.options import Embeddings
from looped_jax.config.registry import EMBEDDINGS
from looped_jax.config.settings import Settings
from looped_jax.model import flops, loss, transformer
from looped_jax.model.embeddings.factorised import FactorisedSettings
from tests.model.test_part import TOKENS, check_decoding, check_gradients, loud, with_parts

OTHERS = tuple(name for name in EMBEDDINGS if name != "separate")
RANK = 8


def config_of(embedding, **model):
    own = Embeddings({"factorised": FactorisedSettings(rank=RANK)})
    return with_parts((), embedding=embedding, embeddings=own, **model)


def as_separate(embedding, params):
    """The two matrices that an embedding stands for."""
    if embedding == "tied":
        return {"embed": params["embed"], "head": params["embed"].T}
    return {
        "embed": params["embed.table"] @ params["embed.up"],
        "head": params["head.down"] @ params["head.columns"],
    }


@pytest.mark.parametrize("variant", ["FLT", "LT"])
@pytest.mark.parametrize("embedding", OTHERS)
def test_it_is_the_two_matrices_that_it_stands_for(embedding, variant):
    config, plain = (config_of(name, variant=variant).model for name in (embedding, "separate"))
    params = loud(config)
    layers = {name: array for name, array in params.items() if name.startswith("blocks.")}
    ours, theirs = (
        loss.logits(c, p, transformer.forward(c, p, TOKENS, return_loops=(0, 2)).hidden)
        for c, p in ((config, params), (plain, layers | as_separate(embedding, params)))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("variant", ["FLT", "LT"])
@pytest.mark.parametrize("embedding", OTHERS)
def test_decoding_equals_the_full_pass(embedding, variant):
    check_decoding(config_of(embedding, variant=variant, layers=1).model)


@pytest.mark.parametrize("embedding", OTHERS)
def test_gradients_reach_every_weight_and_meshes_change_nothing(embedding):
    check_gradients(config_of(embedding, layers=1))


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_a_fresh_model_finds_all_tokens_alike(embedding):
    config = config_of(embedding, width=64).model
    params = transformer.init_params(config, jax.random.key(0))
    hidden = transformer.forward(config, params, TOKENS).hidden
    nats = loss.token_losses(config, params, hidden, np.roll(TOKENS, 1, axis=1))
    np.testing.assert_allclose(nats.mean(), np.log(97), rtol=0.02)
    vectors = (
        params["embed"] if embedding != "factorised" else as_separate(embedding, params)["embed"]
    )
    np.testing.assert_allclose(vectors.std(), 0.02 if embedding == "tied" else 1, rtol=0.2)


def test_every_weight_has_its_group():
    groups = {
        name: {n: w.group for n, w in transformer.weights(config_of(name).model).items()}
        for name in EMBEDDINGS
    }
    own = {
        name: {n: g for n, g in found.items() if not n.startswith("blocks.")}
        for name, found in groups.items()
    }
    assert own == {
        "separate": {"embed": "table", "head": "head"},
        "factorised": {
            "embed.table": "table", "embed.up": "matrix",
            "head.down": "matrix", "head.columns": "head",
        },
        "tied": {"embed": "table"},
    }  # fmt: skip


def test_products_are_counted():
    config = config_of("separate").model
    separate, factorised, tied = (
        flops.count(dataclasses.replace(config, embedding=name))
        for name in ("separate", "factorised", "tied")
    )
    assert tied.flops == separate.flops and tied.looped == separate.looped == factorised.looped
    up, head = config.width * RANK, (config.width + config.padded_vocab) * RANK
    saved = config.width * config.padded_vocab - head - up
    assert separate.flops - factorised.flops == 6 * saved
    assert separate.parameters - tied.parameters == config.width * config.padded_vocab


def test_rank_is_a_setting():
    told = {"model": {"embedding": "factorised", "embeddings": {"factorised": {"rank": 16}}}}
    config = Settings.from_dict(told)
    assert config.model.embeddings["factorised"].rank == 16
    assert Settings.from_dict(config.to_dict()) == config
    assert "embeddings" not in Settings().to_dict()["model"]
