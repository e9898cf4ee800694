"""Files of tokens: read exactly, refused by what is wrong, and rows like any other text's."""

import itertools
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from looped_jax.config.settings import DataConfig, Settings
from looped_jax.data import nanogpt_meta, packing, pipeline, token_files
from looped_jax.data.corpus import RowGroups
from looped_jax.data.token_files import TokenFile
from looped_jax.errors import ConfigError, DataError
from looped_jax.tasks.text import Text
from tests.corpora import open_corpus
from tests.programs import run_here

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden" / "playground"
START = 50_256


def write_shard(path, ids, *, magic=20240520, version=1, dtype="<u2", count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())


def documents(count, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, count)
    return [np.array([START, *random.integers(0, 500, n)], np.int32) for n in lengths]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_files, "GROUP", 100)


@pytest.fixture
def shards(tmp_path, cache):
    """A corpus of two shards to train on and one that validates; documents of the first two."""
    (tmp_path / "s").mkdir()
    parts = [documents(40, seed) for seed in range(3)]
    for name, part in zip(("train_000001", "train_000002", "val_000000"), parts, strict=True):
        write_shard(tmp_path / "s" / f"fineweb_{name}.bin", np.concatenate(part))
    return open_corpus(tmp_path / "s", tmp_path / "cache"), parts[0] + parts[1]


def rows(corpus, count, state=None, **settings):
    found = iter(pipeline.train_rows(corpus, None, seq_len=16, batch_size=4, **settings))
    if state is not None:
        found.set_state(json.loads(json.dumps(state)))
    batches, states = [], [found.get_state()]
    for batch in itertools.islice(found, count):
        batches.append(batch)
        states.append(found.get_state())
    found.close()
    return batches, states


def stream(batches):
    return np.concatenate(batches)[:, :-1].ravel()


def test_row_groups_are_whole_documents_and_none_is_lost(shards):
    corpus, written = shards
    groups = RowGroups(corpus.train)
    found = [list(groups[i]) for i in range(len(groups))]
    assert len(found) > 15
    assert all(each[0] == START and each.dtype == np.int32 for group in found for each in group)
    for ours, theirs in zip(itertools.chain(*found), written, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rows_are_the_stream_and_every_position_continues_exactly(shards):
    corpus, written = shards
    whole = np.concatenate(written)
    batches, states = rows(corpus, 80)
    assert batches[0].dtype == np.int32 and states[-1]["group"] > 20
    np.testing.assert_array_equal(stream(batches), np.resize(whole, 80 * 64))
    for settings in ({}, {"shuffle_seed": 3}, {"packing": packing.best_fit.BestFit()}):
        batches, states = rows(corpus, 40, **settings)
        for at in range(0, 36, 7):
            again, _ = rows(corpus, 4, state=states[at], **settings)
            np.testing.assert_array_equal(again, batches[at : at + 4])
    assert all((row[0] == START) for batch in batches for row in batch)  # of best fit


def test_processes_share_the_row_groups(shards):
    corpus, _ = shards
    groups = RowGroups(corpus.train)
    for process in range(2):
        own = np.concatenate([d for i in range(process, len(groups), 2) for d in groups[i]])
        found = stream(rows(corpus, 8, shard_index=process, shard_count=2)[0])
        np.testing.assert_array_equal(found, own[: len(found)])


def test_workers_read_them_too(shards):
    corpus, _ = shards
    np.testing.assert_array_equal(rows(corpus, 3, workers=1)[0], rows(corpus, 3)[0])


def test_a_document_longer_than_a_row_group_stays_whole(tmp_path, cache):
    long = np.array([START, *range(450)])
    write_shard(tmp_path / "a.bin", [*long, START, 7])
    file = TokenFile(tmp_path / "a.bin")
    assert [len(group) for group in (file[i] for i in range(len(file)))] == [1, 0, 0, 0, 1]
    np.testing.assert_array_equal(file[0][0], long)


def test_a_single_file_is_cut_by_documents(tmp_path, cache):
    write_shard(tmp_path / "a.bin", np.concatenate(written := documents(90)))
    corpus = open_corpus(tmp_path / "a.bin", tmp_path / "cache", val_share=0.2)
    parts = [
        [tuple(each) for i in range(len(file)) for each in file[i]]
        for (file,) in (corpus.train, corpus.val)
    ]
    assert sorted(parts[0] + parts[1]) == sorted(map(tuple, written)) and min(map(len, parts)) > 5


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"magic": 20240521},
            "begins with 20240521, the magic number of no token shard .*20240520",
        ),
        ({"version": 2}, "is of version 2, and 1 alone is known"),
        ({"magic": 20240801}, "is of version 1, and 7 alone"),
        ({"count": 12}, "holds 12 tokens by its header, which are 24 or 12 bytes, but 20 follow"),
        ({"count": 0}, "holds 0 tokens"),
    ],
)
def test_a_damaged_shard_is_refused_by_what_is_wrong(tmp_path, cache, wrong, words):
    write_shard(tmp_path / "x.bin", range(10), **wrong)
    with pytest.raises(DataError, match=f"x.bin {words}"):
        open_corpus(tmp_path, tmp_path / "cache")


def test_a_file_too_short_and_one_of_half_a_token_are_refused(tmp_path, cache):
    (tmp_path / "x.bin").write_bytes(b"\0" * 700)
    with pytest.raises(DataError, match="has 700 bytes, less than a shard's header"):
        TokenFile(tmp_path / "x.bin").check()
    (tmp_path / "val.bin").write_bytes(b"\0" * 701)
    with pytest.raises(DataError, match="has 701 bytes, which are no uint16 tokens"):
        TokenFile(tmp_path / "val.bin").check()
    write_shard(tmp_path / "train.bin", range(10), magic=1)  # no shard, and not nanoGPT's either
    with pytest.raises(DataError, match="begins with 1, the magic number of no"):
        TokenFile(tmp_path / "train.bin").check()


def test_an_id_that_the_vocabulary_does_not_hold_is_named_before_training(tmp_path, cache):
    for name in ("train", "val"):
        write_shard(tmp_path / f"{name}.bin", [START, 5, 6, 50_257 if name == "val" else 7])
    with pytest.raises(DataError, match="val.bin: token 3 is 50257, and the vocabulary has 50257"):
        task(tmp_path)


def test_the_tokenizer_of_other_documents_is_refused(tmp_path, cache):
    for name in ("train", "val"):
        write_shard(tmp_path / f"{name}.bin", [START, 5, 6])
    corpus = open_corpus(tmp_path, tmp_path / "cache")
    corpus.check_ids(100_000, [START])
    with pytest.raises(DataError, match="begin with 50256, and those of the tokenizer with 7;"):
        corpus.check_ids(100_000, [7])


def test_files_of_different_formats_are_refused(tmp_path, cache):
    write_shard(tmp_path / "train.bin", [START, 5])
    write_shard(tmp_path / "val.bin", [1, 5], magic=20240801, version=7, dtype="<u4")
    with pytest.raises(DataError, match="tokens of different formats, <u2 and <u4"):
        task(tmp_path)


def task(folder, **settings):
    return Text(Settings(data=DataConfig(path=str(folder), **settings)))


def test_without_a_tokenizer_the_format_says_the_vocabulary(shards, capsys):
    corpus, _ = shards
    text = task(corpus.train[0].path.parent)
    assert text.tokenizer is None and text.vocab_size == 50_257
    assert text.fingerprint()["tokenizer"] == {"vocab_size": 50_257}
    assert "scores are nats per token and there is no text" in capsys.readouterr().out


def nanogpt(folder, text="hello there\n" * 40):
    """What its preparation of characters leaves."""
    folder.mkdir()
    characters = sorted(set(text))
    ids = np.array([characters.index(each) for each in text], "<u2")
    cut = int(len(ids) * 0.9)
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    (folder / "input.txt").write_text(text)
    stoi = {each: i for i, each in enumerate(characters)}
    meta = {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return text, meta


def test_nanogpts_folder_is_trained_on_as_it_is(tmp_path, cache, capsys):
    written, _ = nanogpt(tmp_path / "char")
    text = task(tmp_path / "char")
    assert "beside token files, left out: input.txt" in capsys.readouterr().out
    assert text.vocab_size == len(set(written)) and (text.tokenizer.token_bytes == 1).all()
    assert text.tokenizer.decode(text.tokenizer.prompt("hello")) == "hello"
    batch, _ = rows(text.corpus, 1)
    assert text.tokenizer.decode(batch[0].ravel()[:17].tolist()) == written[:17]
    (val,) = text.corpus.val
    assert text.tokenizer.decode(np.concatenate(val[0]).tolist()) == written[432:]
    text.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]["h"] >= 0
    with pytest.raises(ConfigError, match="packing=best_fit has to know .*train.bin has no start"):
        pipeline.train_rows(
            text.corpus, None, packing=packing.of(DataConfig(packing="best_fit")), seq_len=16,
            batch_size=4,
        )  # fmt: skip


class Runs:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stoi": Runs()}, "wants to load builtins.print"),
        ({"more": 1}, "it holds .*'more'"),
        ({"itos": {7: "a"}}, "its ids are not 0 to"),
        ({"stoi": {}}, "its stoi is not the inverse"),
        ({"vocab_size": 1, "itos": {0: "ab"}}, "an id that is not one character"),
        ({"vocab_size": "1"}, "its vocab_size no number"),
    ],
)
def test_a_meta_that_is_more_or_less_than_characters_is_refused(
    tmp_path, cache, capsys, change, words
):
    _, meta = nanogpt(tmp_path / "char")
    (path := tmp_path / "char" / "meta.pkl").write_bytes(pickle.dumps({**meta, **change}))
    with pytest.raises(DataError, match=words):
        nanogpt_meta.read_characters(path)
    assert "this ran" not in capsys.readouterr().out
    path.write_bytes(b"\x80\x04}r\xff\xff\xff\x0f.")  # to be kept as number 2^28
    with pytest.raises(DataError, match="beyond all that it has"):
        nanogpt_meta.read_characters(path)
    path.write_bytes(b"\x80\x04nonsense")
    with pytest.raises(DataError, match="meta.pkl holds more or less than ids"):
        nanogpt_meta.read_characters(path)


def test_other_files_that_end_so_leave_text_as_it_was(tmp_path, cache, capsys):
    (tmp_path / "weights.bin").write_bytes(b"\x80" * 5_000)
    (tmp_path / "a.txt").write_text("".join(f"word {i}\n\n" for i in range(9_000)))
    assert not open_corpus(tmp_path, tmp_path / "cache").token_files
    assert "beside text, left out: weights.bin" in capsys.readouterr().out
    (tmp_path / "text").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "text" / "a.txt")
    assert not open_corpus(tmp_path, tmp_path / "cache").token_files
    assert "beside folders of text, left out: weights.bin" in capsys.readouterr().out


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs shared/golden beside the project")
def test_the_golden_shards_are_read_exactly(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path))
    folder, expected = GOLDEN / "shards", np.load(GOLDEN / "shards" / "expected.npz")
    for path in sorted(folder.glob("*.bin")):
        file = TokenFile(path)
        if path.name.startswith("bad_"):
            with pytest.raises(DataError, match=path.name):
                file.check()
            continue
        key = {"fineweb": path.stem.split("_")[1], "bytes": "bytes", "llama3": "llama3"}
        found = np.concatenate([ids for i in range(len(file)) for ids in file[i]])
        np.testing.assert_array_equal(found, expected[key[path.stem.split("_")[0]]])
    for name in ("train.bin", "val.bin"):
        shutil.copy(folder / "bytes_val_000000.bin", tmp_path / name)
    text = task(tmp_path)
    assert text.vocab_size == 256 and (text.tokenizer.token_bytes == 1).all()
    start = np.concatenate(text.corpus.val[0][0])[:26].tolist()
    assert text.tokenizer.decode(start) == "<|endoftext|>From fairest "
    text = task(GOLDEN / "nanogpt_char")
    whole = (GOLDEN / "nanogpt_char" / "input.txt").read_text()
    parts = [np.concatenate(file[0]).tolist() for file in (*text.corpus.train, *text.corpus.val)]
    assert text.tokenizer.decode(parts[0] + parts[1]) == whole


@pytest.mark.slow
def test_a_run_on_tokens_alone_is_judged_by_nats_and_one_on_characters_speaks(home, tmp_path):
    for name, part in (("train", documents(400)), ("val", documents(60, 1))):
        write_shard(tmp_path / f"{name}.bin", np.concatenate(part))
    code, out, err = run_here(home, tmp_path / "a", f"--config.data.path={tmp_path}", steps=4)
    assert code == 0, err
    (first,) = (line for line in out.splitlines() if line.startswith("step 0 validation nats"))
    assert float(first.split()[6]) == pytest.approx(math.log(50_257), abs=0.01)
    assert not (tmp_path / "a" / "tokenizer.json").exists()
    nanogpt(tmp_path / "char")
    given = (f"--config.data.path={tmp_path / 'char'}", "--config.train.eval_tokens=32")
    code, _, err = run_here(home, tmp_path / "b", *given, steps=4)
    assert code == 1 and "train.sample_prompts: 'i' in 'import os" in err
    given = (*given, "--config.train.sample_prompts=hello", "--config.model.loops=1")
    code, out, err = run_here(home, tmp_path / "b", *given, steps=4)
    assert code == 0, err
    assert "step 4 sample: 'hello'" in out and "bits per byte" in out
    assert "generate --checkpoint" in out and "--prompt hello" in out
