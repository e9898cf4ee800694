"""Best-fit packing: nanochat's own rows, exact after a restart, and what a remainder becomes."""

import json
from collections import Counter
from pathlib import Path

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from looped_jax.config.settings import DataConfig, Settings
from looped_jax.data import packing, pipeline
from looped_jax.data.packing.best_fit import BestFit, BestFitRows, BestFitSettings
from looped_jax.errors import CheckpointError, ConfigError, DataError
from looped_jax.resolve import resolve
from looped_jax.training import fingerprint
from tests.corpora import load_tokenizer, open_corpus
from tests.programs import entries, losses, run_here

GOLDEN = Path(__file__).parents[1] / "golden" / "nanochat"


class Lengths:
    """Documents as the goldens have them: 0, then 1 + 10,000 · document + position."""

    def __init__(self, lengths):
        self.lengths = lengths

    def encode_documents(self, texts):
        return [
            np.array([0, *(1 + 10_000 * int(text) + np.arange(1, self.lengths[int(text)]))])
            for text in texts
        ]


def packed(groups, lengths, *, seq_len, state=None, **settings):
    """Iterator over rows of `groups`, lists of documents' numbers."""
    texts = [[str(document) for document in group] for group in groups]
    rows = iter(
        BestFitRows(
            grain.MapDataset.source(texts),
            Lengths(lengths),
            BestFitSettings(**settings),
            seq_len=seq_len,
            workers=0,
        )
    )
    if state is not None:
        rows.set_state(json.loads(json.dumps(state)))
    return rows


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_rows_are_those_of_nanochat(case):
    golden = np.load(GOLDEN / f"pack_{case}.npz")
    told, place = json.loads(str(golden["meta"])), golden["doc_file_rowgroup"]
    trained = place[place[:, 0] < place[:, 0].max()]
    keys = np.unique(trained, axis=0)
    groups = [np.flatnonzero((place == key).all(axis=1)) for key in keys]
    rows = packed(
        groups, golden["doc_lengths"], seq_len=told["T"],
        buffer=told["buffer_size"], refill=told["tokenizer_batch"],
    )  # fmt: skip
    positions = []
    for expected in golden["rows"]:
        np.testing.assert_array_equal(next(rows), expected)
        positions.append(rows.get_state())
    read = [
        [*keys[p["group"] % len(keys)].tolist(), 1 + p["group"] // len(keys)] for p in positions
    ]
    np.testing.assert_array_equal(read[told["B"] - 1 :: told["B"]], golden["state"])
    shares = BestFit().metrics(positions[-1])
    assert shares["data/dropped_share"] == pytest.approx(told["cropped_fraction"], rel=1e-12)


LENGTHS = np.random.default_rng(0).integers(1, 40, 60)
GROUPS = [range(0, 25), [], range(25, 30), range(30, 60)]


@pytest.mark.parametrize("remainder", ["drop", "requeue"])
def test_every_position_continues_exactly_and_holds_no_token(remainder):
    settings = {"seq_len": 16, "buffer": 10, "refill": 4, "remainder": remainder}
    rows = packed(GROUPS, LENGTHS, **settings)
    states, found = [], []
    for _ in range(120):
        states.append(json.dumps(rows.get_state()))
        found.append(next(rows))
    assert json.loads(states[-1])["group"] >= len(GROUPS)
    for at in range(0, 100, 7):
        assert len(json.loads(states[at])["documents"]) <= 10 + 4 + 1
        again = packed(GROUPS, LENGTHS, **settings, state=json.loads(states[at]))
        assert json.dumps(again.get_state()) == states[at]
        np.testing.assert_array_equal([next(again) for _ in range(20)], found[at : at + 20])
        assert json.dumps(again.get_state()) == states[at + 20]
    rows.set_state(json.loads(states[50]))  # the same iterator can go back, too
    np.testing.assert_array_equal(next(rows), found[50])


def test_a_remainder_comes_back_behind_a_start_token_until_nothing_is_left():
    rows = packed([[0]], [12], seq_len=4, buffer=1, refill=1, remainder="requeue")
    found = np.array([next(rows) for _ in range(3)])
    np.testing.assert_array_equal(
        found, [[0, 2, 3, 4, 5], [0, 6, 7, 8, 9], [0, 10, 11, 12, 0]]
    )  # then the next epoch's, cut after its start token
    assert rows.get_state()["dropped"] == 0


def test_every_token_that_was_read_is_in_a_row_or_still_at_hand():
    settings = {"seq_len": 16, "buffer": 10, "refill": 4, "remainder": "requeue"}
    rows = packed(GROUPS, LENGTHS, **settings)
    found = Counter(np.concatenate([next(rows) for _ in range(200)]).tolist())
    state = rows.get_state()
    encoder, endless = Lengths(LENGTHS), [*GROUPS] * 9
    for group, place, start in zip(
        state["groups"], state["documents"], state["starts"], strict=True
    ):
        found.update(encoder.encode_documents([endless[group][place]])[0][start:].tolist())
    read = [d for group in endless[: state["group"]] for d in group]
    read += endless[state["group"]][: state["read"]]
    expected = Counter(np.concatenate(encoder.encode_documents(read)).tolist())
    del found[0], expected[0]  # start tokens, of which every remainder has one
    assert state["group"] > len(GROUPS) and found == expected


def test_long_documents_pile_up_where_the_rest_is_dropped_and_the_log_shows_it():
    lengths = np.tile([5, 5, 5, 30], 25)
    rows = packed([range(100)], lengths, seq_len=16, buffer=20, refill=4)
    shares = []
    for _ in range(300):
        next(rows)
        shares.append(BestFit().metrics(rows.get_state())["data/dropped_share_recent"])
    assert shares[0] < 0.2 and shares[-1] > 0.4


def test_groups_without_any_document_are_an_error_instead_of_an_endless_search():
    with pytest.raises(DataError, match="all 3 row groups that this process trains on are empty"):
        next(packed([[], [], []], [], seq_len=4))


# ---- in the pipeline, and in a run ---------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts = [f"document {i}: " + "word " * (7 * i % 50) for i in range(120)]
    for name, own in (("a", texts[:50]), ("b", texts[50:110]), ("v", texts[110:])):
        pq.write_table(pa.table({"text": own}), folder / f"{name}.parquet", row_group_size=10)
    corpus = open_corpus(folder)
    return corpus, load_tokenizer(corpus, folder)


def batches(made, count, state=None, **settings):
    best_fit = BestFit(BestFitSettings(buffer=30, refill=4))
    settings = {"seq_len": 32, "batch_size": 2, "packing": best_fit} | settings
    rows = iter(pipeline.train_rows(*made, **settings))
    if state is not None:
        rows.set_state(json.loads(json.dumps(state)))
    found, states = [], []
    for _ in range(count):
        states.append(rows.get_state())
        found.append(next(rows))
    rows.close()
    return np.array(found), states


@pytest.mark.parametrize("seed", [None, 5])
def test_batches_continue_exactly_with_and_without_workers_or_prefetch(made, seed):
    found, states = batches(made, 40, workers=1, shuffle_seed=seed)
    assert found.dtype == np.int32 and found.shape == (40, 2, 33)
    assert (found[:, :, 0] == made[1].bos_id).all()
    assert states[-1]["group"] >= 11
    for at in (1, 20, 33):
        again, _ = batches(made, 5, states[at], prefetch=5, shuffle_seed=seed)
        np.testing.assert_array_equal(again, found[at : at + 5])


def test_processes_share_the_row_groups_of_each_file(made):
    """As nanochat's do: 5 of file a and 6 of file b are 3 and 3, and 2 and 3."""
    best_fit = BestFit()
    own = [best_fit.share([5, 6], index=i, count=2) for i in range(2)]
    assert own == [6, 5]
    texts = [f"document {i}:" for i in range(110)]
    for process in range(2):
        found, _ = batches(made, 20, shard_index=process, shard_count=2)
        words = " ".join(made[1].decode(row.tolist()) for row in found.reshape(-1, 33))
        groups = [*range(process, 5, 2), *range(5 + process, 11, 2)]
        expected = [texts[10 * g + i] for g in groups for i in range(10)]
        assert {text for text in texts if text in words} <= set(expected)
    with pytest.raises(DataError, match="6 row groups a file for 7 processes"):
        pipeline.train_rows(*made, packing=best_fit, seq_len=32, batch_size=2, shard_count=7)


def test_another_number_of_hosts_is_refused_by_name():
    best_fit = packing.of(DataConfig(packing="best_fit"))
    with pytest.raises(ConfigError, match="data.packing=best_fit: rows of 2 hosts .* start 2"):
        best_fit.remap_positions([{}, {}], [7], index=0, count=1)
    config = resolve(Settings(), vocab_size=300)
    before, now = (
        fingerprint.of(config, rows={"data": best_fit.fingerprint()}, hosts=n) for n in (2, 1)
    )
    with pytest.raises(CheckpointError, match="start as many, which data.packing=best_fit wants$"):
        fingerprint.check(before, now, run_dir="run")


def test_a_stopped_run_ends_as_one_that_was_not_and_logs_what_is_dropped(home, tmp_path):
    flat = ("--config.optim.warmdown_ratio=0.0", "--config.data.packing=best_fit")
    flat += ("--config.data.packings.best_fit.buffer=40", "--config.train.eval_every=0")
    for run, lengths in (("whole", [8]), ("stopped", [4, 8])):
        for steps in lengths:
            code, out, err = run_here(home, tmp_path / run, *flat, steps=steps)
            assert code == 0, err
    assert "continuing" in out and "dropped_share 0." in out
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    logs = [
        [e["data/dropped_share"] for e in entries(tmp_path / run) if "data/dropped_share" in e]
        for run in ("whole", "stopped")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 8 and all(0 < share < 1 for share in logs[0])
    code, _, err = run_here(home, tmp_path / "whole", flat[0], steps=8)
    assert code == 1 and "data.packing.name: 'best_fit' there, 'absent' here" in err
