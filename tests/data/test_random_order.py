"""Rows that begin anywhere: the same whoever reads them, exact after a restart, and fair."""

import dataclasses
import json

import numpy as np
import pytest

from looped_jax.config.settings import DataConfig, ModelSettings, Settings
from looped_jax.data.random_order import RandomRows
from looped_jax.data.token_stream import TokenStream
from looped_jax.errors import ConfigError, DataError
from looped_jax.runtime.sharding import EVERYTHING, Shard
from looped_jax.tasks.text import Text
from tests.data.test_token_files import write_shard
from tests.programs import losses, run_here

T, COUNT = 8, 1_000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ids 0 … 999 in two files, so that a row's first token is where it begins."""
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path / "cache"))
    for name, ids in (("train_1", range(300)), ("train_2", range(300, COUNT)), ("val", range(50))):
        write_shard(tmp_path / f"{name}.bin", ids)
    return tmp_path


def task(folder, **data):
    data = DataConfig(path=str(folder), order="random", **data)
    return Text(Settings(model=ModelSettings(seq_len=T), data=data))


def steps(text, count, batch_size=6, shard=EVERYTHING, state=None):
    config = dataclasses.replace(Settings(), data=DataConfig())
    rows = text.train_rows(config, batch_size=batch_size, shard=shard)
    if state is not None:
        rows.set_state(json.loads(json.dumps(state)))
    batches, states = [], [rows.get_state()]
    for _ in range(count):
        batches.append(next(rows))
        states.append(rows.get_state())
    rows.close()
    return np.array(batches), states


def test_rows_are_stretches_that_begin_anywhere_across_files_too(folder):
    batches, _ = steps(task(folder), 500)
    rows = batches.reshape(-1, T + 1)
    starts = rows[:, 0]
    np.testing.assert_array_equal(rows, starts[:, None] + np.arange(T + 1))
    assert starts.min() <= 2 and starts.max() >= COUNT - T - 3  # the last begins at N − T − 1
    assert ((starts > 300 - T) & (starts < 300)).any()
    counts = np.bincount(starts // 100, minlength=10)[:9]  # 3,000 rows: 302 in each hundred
    assert (abs(counts - 302) < 5 * np.sqrt(302)).all()
    assert len(set(starts)) < 970  # with replacement: 1,000 · (1 − e⁻³) = 950 of 992


def test_every_position_continues_exactly_and_seeds_differ(folder):
    batches, states = steps(task(folder), 12)
    assert states[3] == {"rows": 18}
    np.testing.assert_array_equal(steps(task(folder), 4, state=states[8])[0], batches[8:])
    assert not np.array_equal(steps(task(folder, shuffle_seed=1), 12)[0], batches)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_very_rows_and_another_number_goes_on_with_the_next(folder, count):
    whole, _ = steps(task(folder), 8)
    parts = [steps(task(folder), 8, 6 // count, Shard(i, count)) for i in range(count)]
    for i, (batches, _) in enumerate(parts):
        np.testing.assert_array_equal(batches, whole[:, i::count])
    positions = [states[5] for _, states in parts]
    alone = task(folder).remap_positions(positions, Shard(0, 1))
    np.testing.assert_array_equal(steps(task(folder), 3, state=alone)[0], whole[5:])


def test_an_epoch_is_as_many_tokens_as_there_are(folder):
    text = task(folder)
    assert text.epochs({"rows": 125}, Shard(0, 1)) == pytest.approx(1)
    assert text.epochs({"rows": 125}, Shard(1, 4)) == pytest.approx(4)


def test_text_is_tokenized_once_and_then_read_as_files_of_tokens_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path / "cache"))
    words = "".join(f"word {i}\n\n" for i in range(4_000))
    (tmp_path / "train.txt").write_text(words)
    (tmp_path / "val.txt").write_text("word 1")
    for time in range(2):
        text = task(tmp_path, tokenizer="characters")
        batches, _ = steps(text, 5)
        for row in batches.reshape(-1, T + 1):
            assert text.tokenizer.decode(row.tolist()) in words
        assert ("writing the tokens" in capsys.readouterr().out) == (time == 0)
    stream = text.order._stream
    assert text.tokenizer.decode(stream.read(0, len(stream)).tolist()) == words


def test_what_does_not_go_together_is_refused(folder):
    with pytest.raises(ConfigError, match="order=random draws .*packing=best_fit fills"):
        task(folder, packing="best_fit")
    with pytest.raises(DataError, match="8 tokens to train on are too few for one row of .*=8"):
        RandomRows(TokenStream([np.arange(8)]), seq_len=8, seed=0)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(home, tmp_path):
    random = ("--config.data.order=random", "--config.optim.warmdown_ratio=0.0")
    assert run_here(home, tmp_path / "whole", *random, steps=8)[0] == 0
    for steps_ in (4, 8):
        code, _, err = run_here(home, tmp_path / "parts", *random, steps=steps_)
        assert code == 0, err
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    code, _, err = run_here(home, tmp_path / "parts", random[1], steps=9)
    assert code == 1 and "data.order: 'random' there, 'absent' here" in err
