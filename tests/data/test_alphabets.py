"""Bytes and characters as tokens, and GPT-2's tokenizer from the files it was published in."""

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from looped_jax.config.settings import DataConfig, Settings
from looped_jax.data import gpt2_tokenizer, packing, pipeline
from looped_jax.data.download import main
from looped_jax.data.token_files import TokenFile
from looped_jax.data.tokenizer import read_tokenizer
from looped_jax.errors import ArgumentError, ConfigError, DataError
from looped_jax.tasks.text import Text
from tests.corpora import load_tokenizer, open_corpus

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
VERSES = "".join(f"naïve 日本 {i}: to be,\n or not\n\n" for i in range(900))


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "train.txt").write_text(VERSES)
    (tmp_path / "val.txt").write_text(VERSES[:2_000] + "¡")  # a letter of validation alone
    return open_corpus(tmp_path, tmp_path / "cache")


def load(corpus, tmp_path, kind, **settings):
    return load_tokenizer(corpus, tmp_path / "cache", kind, **settings)


def test_a_byte_is_its_own_token(corpus, tmp_path):
    words = load(corpus, tmp_path, "bytes")
    assert words.vocab_size == 257 and words.bos_id == 256 and words.bos_token == "<|bos|>"
    for text in (VERSES, "\x00\x7f ~¡", ""):
        assert (
            words.encode(text) == list(text.encode()) and words.decode(words.encode(text)) == text
        )
    assert words.token_bytes.tolist() == [1] * 256 + [0]
    assert load(corpus, tmp_path, "bytes", bos_token="<s>").bos_token == "<s>"


def test_characters_are_those_of_the_corpus_sorted_and_documents_run_on_without_a_start(
    corpus, tmp_path
):
    words = load(corpus, tmp_path, "characters")
    letters = sorted({*VERSES, "¡"})
    assert words.vocab_size == len(letters) and words.start == []
    assert words.encode(VERSES) == [letters.index(each) for each in VERSES]
    assert words.decode(words.encode(VERSES)) == VERSES
    assert words.token_bytes.tolist() == [len(each.encode()) for each in letters]
    batch = next(iter(pipeline.train_rows(corpus, words, seq_len=64, batch_size=30)))
    assert words.decode(batch[:, :-1].ravel().tolist()) == VERSES[: 30 * 64]  # none is lost
    for other in (pickle.loads(pickle.dumps(words)), load(corpus, tmp_path, "characters")):
        assert other.fingerprint() == words.fingerprint()
    (tmp_path / "tokenizer.json").write_text(words.to_json())
    found = read_tokenizer(tmp_path / "tokenizer.json", bos_token=None)
    assert found.fingerprint() == words.fingerprint() and found.start == []


def test_what_characters_cannot_do_is_named(corpus, tmp_path):
    words = load(corpus, tmp_path, "characters")
    with pytest.raises(DataError, match="'Q' in 'to be Q' is none of the 2. characters"):
        words.encode("to be Q")
    with pytest.raises(ArgumentError, match="an empty prompt is no token"):
        words.prompt("")
    with pytest.raises(DataError, match="no start token, which is wanted"):
        _ = words.bos_id
    best_fit = packing.of(DataConfig(packing="best_fit"))
    with pytest.raises(ConfigError, match="best_fit has to know .*use data.packing=stream"):
        pipeline.train_rows(corpus, words, packing=best_fit, seq_len=16, batch_size=4)


def test_characters_have_a_start_token_where_one_is_named(corpus, tmp_path):
    words = load(corpus, tmp_path, "characters", bos_token="<|start|>")
    assert words.bos_id == words.vocab_size - 1 and words.prompt("") == [words.bos_id]
    best_fit = packing.of(DataConfig(packing="best_fit"))
    rows = pipeline.train_rows(corpus, words, packing=best_fit, seq_len=16, batch_size=4)
    assert (next(iter(rows))[:, 0] == words.bos_id).all()


def test_prompts_that_cannot_be_spelt_and_core_are_refused_before_training(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path / "cache"))
    settings = Settings(data=DataConfig(path=str(tmp_path), tokenizer="characters"))
    text = Text(settings)
    with pytest.raises(ConfigError, match="train.sample_prompts: 'T' in 'The capital of F"):
        text.evaluations(settings, None, loop_counts=(1,))
    train = dataclasses.replace(settings.train, sample_tokens=0, core_every=5)
    with pytest.raises(ConfigError, match="train.core_every=5: CORE's prompts begin with a start"):
        text.evaluations(dataclasses.replace(settings, train=train), None, loop_counts=(1,))


# ---- GPT-2's -------------------------------------------------------------------------------------


def published():
    """A small vocabulary in the two files' manner."""
    letters = [chr(byte) for byte in range(ord("!"), ord("~") + 1)] + ["Ġ"]
    tokens = [*letters, "he", "Ġt", "Ġthe", "<|endoftext|>"]
    encoder = json.dumps({token: i for i, token in enumerate(tokens)}).encode()
    return {"encoder.json": encoder, "vocab.bpe": "#version: 0.2\nh e\nĠ t\nĠt he\n".encode()}


def test_gpt2s_tokenizer_is_made_of_its_two_files_and_checked(
    server, tmp_path, monkeypatch, capsys
):
    server.files |= published()
    base = server.url.rpartition("/")[0]
    files = tuple(
        dataclasses.replace(
            file, url=f"{base}/{file.name}",
            sha256=hashlib.sha256(server.files[file.name]).hexdigest(),
        )
        for file in gpt2_tokenizer.FILES
    )  # fmt: skip
    monkeypatch.setattr(gpt2_tokenizer, "FILES", files)
    monkeypatch.chdir(tmp_path)
    server.acts = {"encoder.json": ["cut"]}
    main(["--tokenizer=gpt2"])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "tokenizer: --config.data.tokenizer=data/gpt2/tokenizer.json"
    words = read_tokenizer(tmp_path / "data" / "gpt2" / "tokenizer.json", bos_token=None)
    assert words.bos_token == "<|endoftext|>" and words.bos_id == words.vocab_size - 1
    assert words.decode(words.encode("the the")) == "the the" and len(words.encode("the the")) == 3
    wrong = (dataclasses.replace(files[0], sha256="0" * 64), files[1])
    monkeypatch.setattr(gpt2_tokenizer, "FILES", wrong)
    with pytest.raises(SystemExit):
        main(["--tokenizer=gpt2", f"--tokenizer_out={tmp_path / 'x' / 't.json'}", "--retries=0"])
    assert "has SHA-256" in capsys.readouterr().err and not (tmp_path / "x" / "t.json").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data beside the project")
def test_gpt2s_own_files_cut_shakespeare_as_llm_c_has_it(tmp_path):
    folder = SHARED / "tokenizers" / "gpt2-cs336"
    core = gpt2_tokenizer.core_of(folder / "gpt2_vocab.json", folder / "gpt2_merges.txt")
    core.save(str(tmp_path / "tokenizer.json"))
    words = read_tokenizer(tmp_path / "tokenizer.json", bos_token=None)
    assert (words.vocab_size, words.bos_id) == (50_257, 50_256)
    assert words.encode("Hello world") == [15496, 995]
    path = SHARED / "tinyshakespeare" / "llmc_bin" / "tiny_shakespeare_val.bin"
    file = TokenFile(path)
    documents = [ids for i in range(len(file)) for ids in file[i]]
    whole = (SHARED / "tinyshakespeare" / "input.txt").read_text()
    texts = [words.decode(ids.tolist()) for ids in documents]
    assert len(texts) > 100 and all(text in whole for text in texts)
    for ids, again in zip(documents, words.encode_documents(texts), strict=True):
        np.testing.assert_array_equal(ids, again)
