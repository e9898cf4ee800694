"""A view inside: what is recorded is what is computed, and an edit is what it goes on with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax import Edit
from looped_jax.config.settings import ModelSettings, Settings
from looped_jax.errors import ArgumentError
from looped_jax.inference import inspection
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.model import loss, transformer
from looped_jax.resolve import resolve
from tests.model.test_kv_cache import random_weights

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module", params=["FLT", "LT"])
def model(request):
    sizes = {"layers": 2, "loops": 3, "width": 32, "heads": 4, "kv_heads": 2, "seq_len": 16}
    settings = ModelSettings(variant=request.param, dtype="float32", **sizes)
    config = resolve(Settings(model=settings), vocab_size=97)
    return TrainedModel(config, random_weights(config.model), None, step=1)


def test_logits_and_states_are_those_of_the_model(model):
    run = model.run(TOKENS, loops=(3, 1))
    for k, logits in zip((3, 1), model.logits(TOKENS, loops=(3, 1)), strict=True):
        np.testing.assert_allclose(run.logits[k], logits, atol=1e-4)
        hidden = transformer.forward(model.config.model, model.params, TOKENS, loops=k).hidden[0]
        np.testing.assert_allclose(run.states[k], hidden, atol=1e-5)
    assert run.seen == {} and run.tokens.tolist() == TOKENS.tolist()


def test_only_what_is_asked_for_is_kept(model):
    everything = model.run(TOKENS, record=("state", "block", "weights", "query", "mlp")).seen
    assert everything["state"].shape == (3, 2, 9, 32)
    assert everything["block"].shape == (3, 2, 2, 9, 32)
    assert everything["weights"].shape == (3, 2, 2, 4, 9, 9)
    some = model.run(TOKENS, record="weights", layers=(1,), positions=(8, 2)).seen
    assert some.keys() == {"weights"} and some["weights"].shape == (3, 1, 2, 4, 2, 9)
    expected = everything["weights"][:, 1:, :, :, [8, 2]]
    np.testing.assert_allclose(some["weights"], expected, atol=1e-6)


def test_an_edit_changes_what_comes_after_it_and_nothing_before(model):
    names = ("start", "query", "attention", "mlp", "block", "state")
    plain = model.run(TOKENS, record=names)
    half = model.run(TOKENS, record=names, edit=Edit("mlp", lambda x: 0.5 * x, loop=2, layer=1))
    for name in names:
        np.testing.assert_allclose(half.seen[name][0], plain.seen[name][0], atol=1e-6)
    np.testing.assert_allclose(half.seen["mlp"][1, 0], plain.seen["mlp"][1, 0], atol=1e-6)
    np.testing.assert_allclose(half.seen["mlp"][1, 1], 0.5 * plain.seen["mlp"][1, 1], atol=1e-6)
    assert np.abs(half.seen["block"][1, 1] - plain.seen["block"][1, 1]).max() > 0.01
    assert np.abs(half.logits[3] - plain.logits[3]).max() > 0.01


def test_a_patched_position_changes_later_positions_alone(model):
    plain = model.run(TOKENS).logits[3]
    patched = model.run(TOKENS, edit=Edit("block", 0.0, loop=1, layer=0, position=5)).logits[3]
    np.testing.assert_allclose(plain[:, :5], patched[:, :5], atol=1e-5)
    assert np.abs(plain - patched)[:, 5:].max() > 0.01


@pytest.mark.parametrize(
    "name", ["start", "query", "key", "value", "weights", "attention", "state"]
)
def test_putting_back_what_was_recorded_changes_nothing(model, name):
    plain = model.run(TOKENS, record=name)
    kept = plain.seen[name][1] if name in ("start", "state") else plain.seen[name][1, 1]
    layer = None if name in ("start", "state") else 1
    again = model.run(TOKENS, edit=Edit(name, kept, loop=2, layer=layer))
    np.testing.assert_allclose(again.logits[3], plain.logits[3], atol=1e-4)
    other = model.run(TOKENS, edit=Edit(name, kept[::-1], loop=2, layer=layer))
    assert np.abs(other.logits[3] - plain.logits[3]).max() > 1e-3


def test_loops_go_on_from_a_state(model):
    plain = model.run(TOKENS, loops=(2, 5), record="state")
    later = model.run(TOKENS, loops=5, start=(2, plain.states[2]), record="state")
    np.testing.assert_allclose(later.logits[5], plain.logits[5], atol=1e-4)
    np.testing.assert_allclose(later.seen["state"], plain.seen["state"][2:], atol=1e-5)
    other = model.run(TOKENS, loops=5, start=(2, jnp.zeros_like(plain.states[2])))
    assert np.abs(other.logits[5] - plain.logits[5]).max() > 1e-3


def test_one_row_and_one_count_are_enough(model):
    np.testing.assert_allclose(
        model.logits(TOKENS[0], loops=3)[0][0], model.logits(TOKENS)[0][0], atol=1e-5
    )


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        ([[0, 97]], {}, "token 97 is none of the vocabulary's 0 to 96"),
        ([[0, -1]], {}, "token -1 is none"),
        ([[0.5]], {}, "float64 are no tokens; give a text"),
        ([], {}, "are no tokens"),
        ([[1, 2], [3]], {}, "are no tokens"),
        (TOKENS, {"loops": 0}, "loops=0 must be whole numbers from 1"),
        (TOKENS, {"loops": (1, "2")}, "must be whole numbers"),
        (TOKENS, {"record": "stat"}, "'stat' is nothing that can be seen; choose from start"),
        (TOKENS, {"record": "mlp", "layers": (2,)}, "layers: 2 is none of 0 to 1"),
        (TOKENS, {"record": "mlp", "positions": (9,)}, "positions: 9 is none of 0 to 8"),
        (TOKENS, {"edit": Edit("mlp", 0.0, loop=4)}, "edit of loop 4: loops are 1 to 3"),
        (TOKENS, {"edit": Edit("mlp", 0.0, layer=-1)}, "edit of layer: -1 is none of 0 to 1"),
        (TOKENS, {"edit": Edit("state", 0.0, layer=0)}, "belongs to a loop, so give no layer"),
        (TOKENS, {"edit": Edit("mlp", lambda x: x[:, :1, :1, None])}, "does not fit"),
        (TOKENS, {"edit": Edit("mlp", np.zeros(7))}, r"of shape \(7,\) does not fit"),
        (TOKENS, {"record": "mlp", "layers": ()}, r"layers=\(\) asks for nothing"),
        (TOKENS, {"start": (3, np.zeros((2, 9, 32)))}, "start=3 loops leave none to run"),
        (TOKENS, {"start": (1, np.zeros((2, 32)))}, r"of shape \(2, 32\); give \(2, 9, 32\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(model, tokens, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        model.run(tokens, **arguments)


def test_parts_are_seen_through(model):
    config = model.config.model
    assert not config.parts.on()
    deeper = dataclasses.replace(config, layers=1)
    params = transformer.init_params(deeper, jax.random.key(0))
    alone = TrainedModel(dataclasses.replace(model.config, model=deeper), params, None, step=0)
    run = alone.run(TOKENS, record="block")
    logits = loss.logits(deeper, params, run.states[3])
    np.testing.assert_allclose(run.logits[3], logits, atol=1e-5)


def test_layers_come_in_the_order_asked_for(model):
    both, turned = (model.run(TOKENS, record="mlp", layers=o).seen["mlp"] for o in ((0, 1), (1, 0)))
    np.testing.assert_array_equal(both[:, ::-1], turned)


def test_a_sweep_of_edits_is_one_program(model):
    inspection._program.cache_clear()
    for loop in (1, 2, 3):
        for value in (0.0, 1.0):
            model.run(TOKENS, edit=Edit("mlp", value, loop=loop, layer=1))
    assert inspection._program.cache_info().currsize == 1
    function = model.run(TOKENS, edit=Edit("mlp", lambda x: 0 * x, loop=2)).logits[3]
    zeroed = model.run(TOKENS, edit=Edit("mlp", 0.0, loop=2)).logits[3]
    np.testing.assert_allclose(function, zeroed, atol=1e-5)
    assert float(model.run(TOKENS, edit=Edit("state", lambda x: 0.0)).states[3].max()) == 0


def test_an_edit_of_a_loop_that_is_not_run_is_refused(model):
    state = np.zeros((2, 9, 32))
    with pytest.raises(ArgumentError, match="edit of loop 1: loops are 3 to 5"):
        model.run(TOKENS, loops=5, start=(2, state), edit=Edit("mlp", 0.0, loop=1))
