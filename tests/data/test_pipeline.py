"""Rows: nothing lost, nothing twice, the same whatever reads them, and exact after a restart."""

import itertools
import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from looped_jax.data import corpus, pipeline, text_files
from looped_jax.errors import DataError
from tests.corpora import load_tokenizer, open_corpus

FINEWEB = Path(__file__).parents[2] / ".." / "shared" / "data" / "fineweb_edu" / "base_data"
DOCUMENTS = [f"document {i}: " + "word " * (7 * i % 50) for i in range(120)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, texts in (("a", DOCUMENTS[:60]), ("b", DOCUMENTS[60:110]), ("v", DOCUMENTS[110:])):
        table = pa.table({"text": [*texts, None, ""]})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=10)
    texts = open_corpus(folder)
    return texts, load_tokenizer(texts, folder)


def rows(made, count, state=None, interrupted_at=None, **settings):
    settings = {"seq_len": 16, "batch_size": 4} | settings
    iterator = iter(pipeline.train_rows(*made, **settings))
    if state is not None:
        iterator.set_state(json.loads(json.dumps(state)))
    batches, states = [], [iterator.get_state()]
    for number in range(count):
        if number == interrupted_at:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGINT)
        batches.append(next(iterator))
        states.append(iterator.get_state())
    iterator.close()
    return batches, states


def stream_of(batches):
    """The token stream that overlapping rows were cut from."""
    flat = np.concatenate(batches)
    np.testing.assert_array_equal(flat[:-1, -1], flat[1:, 0])  # neighbours share one token
    return np.concatenate([flat[:, :-1].ravel(), flat[-1, -1:]])


def test_rows_hold_every_document_in_order_epoch_after_epoch(made):
    texts, words = made
    epoch = np.concatenate(words.encode_documents(DOCUMENTS[:110]))
    batches, _ = rows(made, 3 * len(epoch) // (16 * 4))
    assert batches[0].shape == (4, 17) and batches[0].dtype == np.int32
    stream = stream_of(batches)
    assert len(stream) > 2 * len(epoch)
    np.testing.assert_array_equal(stream, np.resize(epoch, len(stream)))


@pytest.fixture(scope="module")
def of_workers(made):
    """Batches and their positions; starting two processes takes longer than all of them.

    After some, Ctrl-C reaches these, as it does in a terminal.
    """
    return rows(made, 150, workers=2, interrupted_at=25)


def test_every_position_continues_exactly(made):
    batches, states = rows(made, 50)
    for at in range(0, 45, 4):
        again, _ = rows(made, 5, state=states[at])
        np.testing.assert_array_equal(again, batches[at : at + 5])


def test_rows_do_not_depend_on_workers_their_interrupts_prefetch_or_batch_size(made, of_workers):
    plain, _ = rows(made, 150)
    np.testing.assert_array_equal(plain, of_workers[0])
    plain = plain[:50]
    np.testing.assert_array_equal(plain, rows(made, 50, prefetch=7)[0])
    np.testing.assert_array_equal(
        np.concatenate(plain), np.concatenate(rows(made, 25, batch_size=8)[0])
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_taken_with_workers_continues_with_and_without(made, of_workers, workers):
    batches, states = of_workers
    again, _ = rows(made, 5, state=states[17], workers=workers)
    np.testing.assert_array_equal(again, batches[17:22])


def test_positions_stay_small_and_readable(made):
    _, states = rows(made, 40)
    for state in states:
        assert set(state) == {"group", "cursor", "head"} and len(state["head"]) <= 16


def test_processes_share_the_row_groups(made):
    texts, words = made
    groups = corpus.RowGroups(texts.train)
    assert len(groups) == 13
    for process in range(3):
        expected = [words.encode_documents(groups[i]) for i in range(process, 13, 3)]
        epoch = np.concatenate(list(itertools.chain.from_iterable(expected)))
        stream = stream_of(rows(made, 20, shard_index=process, shard_count=3)[0])
        np.testing.assert_array_equal(stream, np.resize(epoch, len(stream)))
    with pytest.raises(DataError, match="13 row groups for 14 processes"):
        pipeline.train_rows(*made, seq_len=16, batch_size=4, shard_count=14)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A text file and its JSON lines, cut into many small row groups, as `made` has them."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "a.txt").write_text("<|endoftext|>\n".join(f"{text}\n" for text in DOCUMENTS))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    (folder / "a.jsonl").write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "GROUP", 1_000)
        patch.setattr(text_files, "_SEARCHED", 500)
        found = []
        for name in ("a.txt", "a.jsonl"):
            texts = open_corpus(folder / name, folder)
            found.append((texts, load_tokenizer(texts, folder)))
    return found


@pytest.mark.parametrize("kind", [0, 1])
def test_plain_text_and_json_lines_flow_as_parquet_does(plain, kind):
    texts, words = plain[kind]
    groups, validation = corpus.RowGroups(texts.train), corpus.RowGroups(texts.val)
    assert len(groups) == len(validation) > 10
    trained, held_out = (
        [text.strip() for i in range(len(each)) for text in each[i]]
        for each in (groups, validation)
    )
    assert sorted(trained + held_out) == sorted(text.strip() for text in DOCUMENTS) and held_out
    batches, states = rows((texts, words), 40)
    stream = stream_of(batches)
    epoch = itertools.chain.from_iterable(
        words.encode_documents(groups[i]) for i in range(len(groups))
    )
    np.testing.assert_array_equal(stream, np.resize(np.concatenate([*epoch]), len(stream)))
    again, _ = rows((texts, words), 5, state=states[23], workers=1)
    np.testing.assert_array_equal(again, batches[23:28])


# ---- shuffled -----------------------------------------------------------------------------------


@pytest.fixture
def shuffled(made, monkeypatch):
    """As `made`; the documents of three row groups are shuffled together."""
    monkeypatch.setattr(pipeline, "_SHUFFLED", 3 * corpus.RowGroups(made[0].train).mean_size())
    monkeypatch.setattr(pipeline, "_ELEMENTS", 1)
    return made


def epochs(made, count, seed):
    """Documents of each epoch, in the order of training."""
    groups = pipeline.document_groups(made[0], shuffle_seed=seed)
    endless = groups.repeat()
    return [
        [text for i in range(e * len(groups), (e + 1) * len(groups)) for text in endless[i]]
        for e in range(count)
    ]


def test_shuffled_epochs_hold_every_document_once_each_in_another_order(shuffled):
    first, second = epochs(shuffled, 2, seed=5)
    files_order = DOCUMENTS[:110]
    assert sorted(first) == sorted(second) == sorted(files_order)
    assert len({tuple(first), tuple(second), tuple(files_order)}) == 3
    assert epochs(shuffled, 2, seed=5) == [first, second]
    assert epochs(shuffled, 1, seed=6) != [first]
    assert epochs(shuffled, 1, seed=None) == [files_order]


def test_a_small_corpus_is_left_in_enough_parts_for_many_processes(made):
    assert len(pipeline.document_groups(made[0], shuffle_seed=5)) == 13  # all of its row groups


def test_documents_of_several_row_groups_mix(shuffled):
    groups = pipeline.document_groups(shuffled[0], shuffle_seed=5)
    assert len(groups) == 5  # of 13 row groups
    neighbours = [DOCUMENTS.index(text) // 10 for text in groups[0]]
    assert len(set(neighbours)) == 3 and len(list(itertools.groupby(neighbours))) > 9


@pytest.mark.parametrize(("workers", "places"), [(0, range(0, 75, 3)), (2, (35,))])
def test_shuffled_rows_continue_exactly_from_every_small_position(shuffled, workers, places):
    batches, states = rows(shuffled, 80, workers=workers, shuffle_seed=5)
    np.testing.assert_array_equal(batches, rows(shuffled, 80, shuffle_seed=5)[0])
    assert not np.array_equal(batches, rows(shuffled, 80)[0])
    assert states[-1]["group"] >= 5  # past the first epoch
    for at in places:
        assert set(states[at]) == {"group", "cursor", "head"} and len(states[at]["head"]) <= 16
        again, _ = rows(shuffled, 5, state=states[at], workers=workers, shuffle_seed=5)
        np.testing.assert_array_equal(again, batches[at : at + 5])


def test_processes_share_the_shuffled_documents(shuffled):
    words = shuffled[1]
    whole = pipeline.document_groups(shuffled[0], shuffle_seed=5).repeat()
    for process in range(2):
        # an epoch has five elements: the first process takes three of them, the other two
        own = [e * 5 + i for e in range(3) for i in range(process, 5, 2)]
        stream = np.concatenate([t for i in own for t in words.encode_documents(whole[i])])
        cut = Counter(tuple(stream[at : at + 17]) for at in range(0, len(stream) - 16, 16))
        batches, _ = rows(shuffled, 60, shard_index=process, shard_count=2, shuffle_seed=5)
        found = Counter(map(tuple, np.concatenate(batches)))
        assert found.total() == 240 and found <= cut
    with pytest.raises(DataError, match="5 row groups for 6 processes"):
        pipeline.train_rows(*shuffled, seq_len=16, batch_size=4, shard_count=6, shuffle_seed=5)


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (4, 1), (64, 1), (3, 2), (2, 5)])
def test_validation_scores_the_same_targets_however_it_is_split(made, batch_size, processes):
    texts, words = made
    settings = {"seq_len": 16, "max_tokens": 400, "batch_size": batch_size}
    shares = [
        pipeline.val_rows(*made, **settings, shard_index=i, shard_count=processes)
        for i in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    pairs = set()
    for batch in itertools.chain.from_iterable(shares):
        assert batch["inputs"].shape == batch["targets"].shape == (batch_size, 16)
        for x, y in zip(batch["inputs"], batch["targets"], strict=True):
            if (y >= 0).all():
                pairs.add((*x.tolist(), int(y[-1])))
            else:
                assert (y == -1).all()
    stream = np.concatenate(words.encode_documents(DOCUMENTS[110:]))
    count = min(400 // 16, (len(stream) - 1) // 16)
    assert pairs == {tuple(stream[16 * r : 16 * r + 17].tolist()) for r in range(count)}


def test_a_validation_shard_too_short_for_a_row_is_named(made):
    with pytest.raises(DataError, match="v.parquet holds .* too few for one row of model.seq_len"):
        pipeline.val_rows(*made, seq_len=100_000, batch_size=1, max_tokens=100_000)


def test_validation_of_less_than_a_row_is_refused(made):
    with pytest.raises(DataError, match="10 validation tokens .* model.seq_len=16; raise eval_tok"):
        pipeline.val_rows(*made, seq_len=16, batch_size=1, max_tokens=10)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_met_while_training_is_named(made, tmp_path, workers):
    for name in "ab":
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"text": ["x" * 5000] * 20}), path, row_group_size=5)
    texts, words = open_corpus(tmp_path), made[1]
    with pq.ParquetFile(path := texts.train[0].path) as file:
        place = file.metadata.row_group(2).column(0).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 20] = b"\xff" * 20
    path.write_bytes(content)
    batches = iter(pipeline.train_rows(texts, words, seq_len=64, batch_size=4, workers=workers))
    with pytest.raises(DataError, match="a.parquet: row group 2 is damaged"):
        list(itertools.islice(batches, 100_000))
    batches.close()


@pytest.mark.skipif(not FINEWEB.is_dir(), reason="needs shared/data beside the project")
def test_real_fineweb_flows(tmp_path):
    texts = open_corpus(FINEWEB, tmp_path)
    words = load_tokenizer(texts, tmp_path, vocab_size=1024)
    batch = next(iter(pipeline.train_rows(texts, words, seq_len=256, batch_size=4)))
    start = words.decode(batch[0, :200].tolist())
    assert len(start) > 200 and corpus.RowGroups(texts.train)[0][0].startswith(start)
    val = pipeline.val_rows(texts, words, seq_len=256, batch_size=4, max_tokens=4096)
    assert sum((b["targets"] >= 0).sum() for b in val) == 4096
