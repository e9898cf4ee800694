"""Splitting, special tokens and byte lengths of trained and given tokenizers."""

import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from looped_jax.config.settings import DataConfig
from looped_jax.data import tokenizer
from looped_jax.data.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Tokenizer,
    train_tokenizer,
)
from looped_jax.errors import DataError
from tests.corpora import load_tokenizer, open_corpus

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
TEXTS = [
    "The quick brown fox's tail, 2024 times over.\n\n  It's 12345 miles.\n",
    "def f(x):\n    return x ** 2  # naïve café\n",
    "日本語のテキスト と émigré Ωμέγα 🙂🙃 <|bos|> not a start\r\n\tend  ",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in "ab":
        pq.write_table(pa.table({"text": TEXTS * 20}), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def texts(folder):
    return open_corpus(folder)


def load(path, texts, cache, **settings):
    return load_tokenizer(texts, cache, path, **{"vocab_size": 320} | settings)


@pytest.fixture(scope="module")
def trained(texts, folder):
    return load(None, texts, folder)


def test_round_trip_and_byte_lengths(trained):
    for text in TEXTS:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained.token_bytes[ids].sum() == len(text.encode())
    assert trained.token_bytes.shape == (trained.vocab_size,)


def test_every_byte_is_one_token_of_one_byte(trained):
    """Also those that are no UTF-8 on their own, which decode to a three-byte replacement."""
    assert (trained.token_bytes[:256] == 1).all()


def test_special_tokens_come_last_and_have_no_bytes(trained):
    assert trained.vocab_size == 320
    ids = [trained._core.token_to_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(311, 320)) and trained.bos_id == 311
    assert not trained.token_bytes[ids].any()
    assert trained.stop_ids == {311, 315}


def test_special_strings_in_text_are_ordinary_text(trained):
    assert trained.bos_id not in trained.encode("<|bos|> <|user_end|>")
    documents = trained.encode_documents(["<|bos|>", "a"])
    assert [int((d == trained.bos_id).sum()) for d in documents] == [1, 1]
    assert all(d.dtype == np.int32 and d[0] == trained.bos_id for d in documents)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("it's we'LL", ["it", "'s", " we", "'LL"]),
        ("12345", ["12", "34", "5"]),
        ("a  b", ["a", " ", " b"]),
        (" (x)!\n\ny", [" (", "x", ")!\n\n", "y"]),
        ("\tif x", ["\tif", " x"]),
        ("a \n \n b", ["a", " \n \n", " b"]),
        ("end  ", ["end", "  "]),
    ],
)
def test_split_pattern(text, pieces):
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces


def test_training_is_deterministic_and_cached(texts, folder, tmp_path, trained):
    train_tokenizer(iter(TEXTS * 20), 320, path=tmp_path / "one.json")
    train_tokenizer(iter(TEXTS * 20), 320, path=tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    cached = list((folder / "tokenizers").glob("*.json"))
    before = [path.stat().st_mtime_ns for path in cached]
    assert load(None, texts, folder).fingerprint() == trained.fingerprint()
    assert [path.stat().st_mtime_ns for path in cached] == before and len(cached) == 1


def test_of_two_that_start_at_once_one_trains_and_the_other_waits(texts, tmp_path, monkeypatch):
    began, train = [], tokenizer.train_tokenizer

    def slowly(*given, **settings):
        began.append(time.monotonic())
        time.sleep(0.3)
        train(*given, **settings)

    monkeypatch.setattr(tokenizer, "train_tokenizer", slowly)
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path))
    data = DataConfig(tokenizer_vocab_size=320)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: tokenizer.load_tokenizer(data, texts), range(2))
    assert len(began) == 1 and one.fingerprint() == other.fingerprint()
    assert [path.suffix for path in (tmp_path / "tokenizers").iterdir()] == [".json"]


def test_survives_pickling_and_saving(trained, texts, tmp_path):
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.fingerprint() == trained.fingerprint() and copy.encode(TEXTS[2]) == trained.encode(
        TEXTS[2]
    )
    path = tmp_path / "tokenizer.json"
    path.write_text(trained.to_json())
    assert load(str(path), texts, tmp_path).fingerprint() == trained.fingerprint()


def test_documents_are_encoded_a_few_at_once_and_come_as_of_all(trained, monkeypatch):
    """All of a row group at once would take 30 times its text in memory."""
    whole, sizes, core = trained.encode_documents(TEXTS * 5), [], trained._core

    class Core:
        def encode_batch_fast(self, texts, **settings):
            sizes.append(len(texts))
            return core.encode_batch_fast(texts, **settings)

    monkeypatch.setattr(trained, "_core", Core())
    monkeypatch.setattr(tokenizer, "_ENCODED_AT_ONCE", 150)
    parts = trained.encode_documents(TEXTS * 5)
    assert sizes == [3] * 5
    assert [each.tolist() for each in parts] == [each.tolist() for each in whole]


def test_named_start_token(trained, texts, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(trained.to_json())
    found = load(str(path), texts, tmp_path, bos_token="<|user_start|>")
    assert found.bos_id == 312
    with pytest.raises(
        DataError, match=r"no special token <\|im_start\|>; choose one of <\|bos\|>"
    ):
        load(str(path), texts, tmp_path, bos_token="<|im_start|>")


def test_added_tokens_that_are_not_special_keep_their_bytes(trained):
    core = tokenizers.Tokenizer.from_str(trained.to_json())
    core.add_tokens(["<think>é"])
    with_added = Tokenizer(core, bos_token=None, source="x")
    assert with_added.vocab_size == 321 and with_added.token_bytes[320] == len("<think>é".encode())


def test_the_named_start_token_always_stops(trained):
    core = tokenizers.Tokenizer.from_str(trained.to_json())
    core.add_special_tokens(["<start of text>"])
    found = Tokenizer(core, bos_token="<start of text>", source="x")
    assert found.bos_id == 320 and found.stop_ids == {311, 315, 320}


def test_truncation_and_padding_of_a_file_are_not_applied(trained, texts, tmp_path):
    core = tokenizers.Tokenizer.from_str(trained.to_json())
    core.enable_truncation(5)
    core.enable_padding(length=99)
    core.save(str(tmp_path / "short.json"))
    found = load(str(tmp_path / "short.json"), texts, tmp_path)
    assert found.encode(TEXTS[0]) == trained.encode(TEXTS[0])
    for ours, theirs in zip(
        found.encode_documents(TEXTS), trained.encode_documents(TEXTS), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_training_reads_the_start_of_long_documents_and_stops_at_the_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizer, "_TRAINING_CHARACTERS", 25_000)
    asked = []

    def texts():
        for letter in "abcdef":
            asked.append(letter)
            yield f"{letter * 3} " * 2_500 + "zzz " * 1_000

    train_tokenizer(texts(), 300, path=tmp_path / "t.json")
    assert asked == ["a", "b", "c"]  # 10,000 characters of each
    vocabulary = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json")).get_vocab()
    assert {"aaa", "bbb", "ccc"} <= vocabulary.keys() and "zzz" not in vocabulary


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path):
    with pytest.raises(DataError, match="data.tokenizer_vocab_size=264 .* give at least 265"):
        train_tokenizer(iter(TEXTS), 264, path=tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data beside the project")
def test_real_text_comes_back_and_its_bytes_add_up(trained):
    """Text in which a tokenizer of 320 entries has to spell letters of many bytes."""
    shakespeare = (SHARED / "tinyshakespeare" / "input.txt").read_text("utf-8")[:100_000]
    wikipedia = (SHARED / "wikitext-2-v1" / "valid.txt").read_text("utf-8")[:300_000]
    assert not wikipedia.isascii()
    for text in (shakespeare, wikipedia):
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained.token_bytes[ids].sum() == len(text.encode())


def test_bad_tokenizer_files_are_named(texts, tmp_path):
    with pytest.raises(DataError, match="there is no file .*absent.json"):
        load(str(tmp_path / "absent.json"), texts, tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"model": 3}))
    with pytest.raises(DataError, match="broken.json is no tokenizer.json"):
        load(str(broken), texts, tmp_path)
    pieces = tokenizers.Tokenizer(models.BPE())
    pieces.decoder = decoders.Metaspace()
    pieces.save(str(tmp_path / "metaspace.json"))
    with pytest.raises(DataError, match="metaspace.json is not byte-level .*Metaspace"):
        load(str(tmp_path / "metaspace.json"), texts, tmp_path)
