"""What holds for any input, under every loop rule: drawn by Hypothesis, a few quickly, many slowly.

Shapes are few, so that a rule's program is compiled once.
"""

import functools
import json

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from looped_jax.config.options import Parts
from looped_jax.config.registry import EMBEDDINGS, LOOP_RULES, OBJECTIVES, OPTIMIZERS, PARTS
from looped_jax.config.settings import ModelSettings, Settings, default_config
from looped_jax.data import alphabets
from looped_jax.data.tokenizer import Tokenizer, read_tokenizer, train_tokenizer
from looped_jax.inference.decoding import Sampling, generate_tokens
from looped_jax.model import loss, transformer
from looped_jax.resolve import resolve
from tests.model.test_part import loud
from tests.model.test_transformer import logits_at
from tests.programs import ROOT

RULES = tuple(LOOP_RULES)
VOCAB, TIME = 61, 8
TOKEN = st.integers(0, VOCAB - 1)
OFTEN = pytest.mark.parametrize("examples", [15, pytest.param(100, marks=pytest.mark.slow)])


def holds(examples, **drawn):
    """Decorates a claim about what is drawn; it is examined at once, always on the same."""

    def examined(claim):
        settings = hypothesis.settings(
            max_examples=examples, deadline=None, derandomize=True, database=None
        )
        settings(hypothesis.given(**drawn)(claim))()

    return examined


@functools.cache
def model(rule):
    """A small one of that rule, and weights of which no loop hides."""
    settings = ModelSettings(
        variant=rule, layers=1, loops=3, width=16, heads=2, seq_len=TIME, dtype="float32"
    )
    config = resolve(Settings(model=settings), vocab_size=VOCAB).model
    return config, loud(config)


@OFTEN
def test_logits_have_the_shape_of_any_rows_at_any_loop_count(examples):
    @holds(
        examples, rule=st.sampled_from(RULES), rows=st.integers(1, 5), time=st.integers(1, 40),
        loops=st.integers(1, 6),
    )  # fmt: skip
    def claim(rule, rows, time, loops):
        config, params = model(rule)

        def logits(tokens):
            states = transformer.forward(config, params, tokens, loops=loops).hidden
            return loss.logits(config, params, states)

        found = jax.eval_shape(logits, jax.ShapeDtypeStruct((rows, time), np.int32))
        assert found.shape == (1, rows, time, VOCAB) and found.dtype == np.float32


@OFTEN
@pytest.mark.parametrize("rule", RULES)
def test_a_later_token_changes_no_earlier_logits_in_any_loop(rule, examples):
    @holds(
        examples, row=st.lists(TOKEN, min_size=TIME, max_size=TIME),
        place=st.integers(1, TIME - 1), others=st.lists(TOKEN, min_size=TIME, max_size=TIME),
    )  # fmt: skip
    def claim(row, place, others):
        config, params = model(rule)
        changed = row[:place] + [(row[place] + 1) % VOCAB] + others[place + 1 :]
        found = np.asarray(logits_at(config, params, np.array([row, changed], np.int32), (1, 2, 3)))
        first, second = found[:, 0], found[:, 1]
        np.testing.assert_allclose(first[:, :place], second[:, :place], rtol=0, atol=1e-5)
        assert np.abs(first[:, place] - second[:, place]).max() > 1e-3  # its own follow from it


@OFTEN
@pytest.mark.parametrize(
    "rule", ["FLT", *(pytest.param(r, marks=pytest.mark.slow) for r in RULES if r != "FLT")]
)
def test_the_same_seed_draws_the_same_tokens(rule, examples):
    @holds(
        examples, prompt=st.lists(TOKEN, min_size=1, max_size=4), seed=st.integers(0, 2**31 - 1),
        top_p=st.floats(0.1, 1.0), top_k=st.integers(0, VOCAB),
    )  # fmt: skip
    def claim(prompt, seed, top_p, top_k):
        config, params = model(rule)
        sampling = Sampling(seed=seed, temperature=0.8, top_k=top_k, top_p=top_p)
        first, second = (
            np.concatenate([*generate_tokens(config, params, prompts, tokens=5, sampling=sampling)])
            for prompts in ([prompt], [prompt])
        )
        np.testing.assert_array_equal(first, second)
        assert len(first) == 5 and first.min() >= 0 and first.max() < VOCAB


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    train_tokenizer(iter([(ROOT / "README.md").read_text("utf-8")]), 300, path=path)
    return read_tokenizer(path, bos_token=None)


@OFTEN
def test_any_text_comes_back_from_its_tokens(trained, examples):
    of_bytes = Tokenizer(alphabets.of_bytes(), bos_token=None, source="bytes")

    @holds(examples * 4, text=st.text(st.characters(exclude_categories=["Cs"])))
    def claim(text):
        for words in (trained, of_bytes):
            ids = words.encode(text)
            assert words.decode(ids) == text
            assert sum(words.token_bytes[ids]) == len(text.encode())


@OFTEN
def test_settings_come_back_from_json_and_from_what_presets_edit(examples):
    @holds(
        examples, variant=st.sampled_from(RULES), layers=st.integers(1, 9),
        loops=st.integers(1, 99), loss=st.sampled_from([*OBJECTIVES]),
        embedding=st.sampled_from([*EMBEDDINGS]), optimizer=st.sampled_from([*OPTIMIZERS]),
        parts=st.sets(st.sampled_from([*PARTS])), seed=st.integers(0, 2**32),
        rate=st.floats(0, 1e3), prompts=st.lists(st.text()),
    )  # fmt: skip
    def claim(variant, layers, loops, loss, embedding, optimizer, parts, seed, rate, prompts):
        config = default_config()
        config.model.update(
            variant=variant, layers=layers, loops=loops, loss=loss, embedding=embedding
        )
        for name in parts:
            config.model.parts[name].on = True
        config.optim.optimizer, config.optim.matrix_learning_rate = optimizer, rate
        config.train.seed, config.train.sample_prompts = seed, tuple(prompts)
        settings = Settings.from_dict(config)
        assert settings.model.parts.on() == Parts(settings.model.parts.changed()).on()
        assert {*settings.model.parts.on()} == parts and settings.model.loops == loops
        again = Settings.from_dict(json.loads(json.dumps(settings.to_dict())))
        assert again == settings and hash(again.model) == hash(settings.model)
