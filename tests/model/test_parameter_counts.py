"""Parameters that scale a run: what each count takes, and how loops enter."""

import pytest

from looped_jax.config import presets
from looped_jax.config.settings import PARAMETER_COUNTS, Settings
from looped_jax.model import flops, parameter_counts
from looped_jax.resolve import resolve


def model(variant="FLT", parts=(), **changes):
    config = presets.make(variant, "tiny")
    config.model.update(changes)
    for part in parts:
        config.model.parts[part].on = True
    return resolve(Settings.from_dict(config), vocab_size=300).model


def counts(config):
    return {how: parameter_counts.count(config, how) for how in PARAMETER_COUNTS}


LAYERS, HEAD = 2 * 12 * 128**2, 320 * 128  # of the tiny preset with this vocabulary


def test_counts_of_the_plain_model():
    found = counts(model())
    assert found == {
        "all": LAYERS + 2 * HEAD,
        "unique": LAYERS + HEAD,
        "usage_weighted": 4 * LAYERS + HEAD,
        "flop_matched": round(flops.count(model()).flops / 6),
    }
    attention = 2 * 128 * 128 * 2 * 4  # 12 · D · T / 6 of two layers, four times
    assert found["flop_matched"] == found["usage_weighted"] + attention
    one = counts(model(loops=1))
    assert one["unique"] == one["usage_weighted"] == found["unique"]


def test_a_weight_counts_as_often_as_it_is_used():
    plain = counts(model())
    around = counts(model(parts=("prelude", "coda")))
    assert around["unique"] - plain["unique"] == 2 * LAYERS
    assert around["usage_weighted"] - plain["usage_weighted"] == 2 * LAYERS
    rule = counts(model("linear"))
    assert rule["unique"] - plain["unique"] == 2 * 128**2
    assert rule["usage_weighted"] - plain["usage_weighted"] == 4 * 2 * 128**2
    lora = counts(model(parts=("loop_lora",)))
    assert lora["unique"] - plain["unique"] == lora["usage_weighted"] - plain["usage_weighted"] > 0


@pytest.mark.parametrize("parts", [("value_embedding",), ("residual_scalars", "loop_embedding")])
def test_tables_scalars_and_vectors_do_not_count(parts):
    plain, more = counts(model()), counts(model(parts=parts))
    assert more["all"] > plain["all"] and more["unique"] == plain["unique"]


def test_of_a_tied_embedding_the_matrix_is_the_head():
    assert counts(model(embedding="tied"))["unique"] == LAYERS + HEAD == 434_176
