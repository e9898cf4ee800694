"""The task of text: what two runs share, and where another number of hosts goes on."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from looped_jax import cli
from looped_jax.config import presets
from looped_jax.config.settings import DataConfig, Settings
from looped_jax.data import pipeline
from looped_jax.resolve import resolve
from looped_jax.runtime.sharding import Shard
from looped_jax.tasks.text import Text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "_ELEMENTS", 1)
    for name in "ab":
        texts = [f"document {i} of {name} " * 9 for i in range(40)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=4)
    return tmp_path


def task(folder, **settings):
    return Text(Settings(data=DataConfig(path=str(folder), tokenizer_vocab_size=300, **settings)))


def test_shuffling_is_part_of_what_two_runs_share_and_off_adds_nothing(folder):
    plain, shuffled, other = (
        task(folder, shuffle_seed=seed).fingerprint() for seed in (None, 0, 1)
    )
    assert set(plain["data"]) == {"val", "train"}
    assert set(plain["data"]["train"][0]) == {
        "name", "bytes", "rows", "row_groups", "footer_sha256",
    }  # fmt: skip
    how = {"shuffle_seed": 0, "shuffled": "documents and rows"}  # runs that did without: others
    assert shuffled == {**plain, "data": plain["data"] | how}
    assert other != shuffled
    assert json.loads(json.dumps(shuffled)) == shuffled


@pytest.mark.parametrize(("together", "elements"), [(1, 10), (4, 3)])
def test_other_hosts_go_on_where_shuffled_ones_stood(folder, monkeypatch, together, elements):
    text = task(folder, shuffle_seed=0)
    size = sum(file.size() for file in text.corpus.train) / 10
    monkeypatch.setattr(pipeline, "_SHUFFLED", together * size)
    # one host has finished an epoch and one element more: two go on there, each with its own
    position = [{"group": elements + 1, "cursor": 5, "head": [1]}]
    began = [text.remap_positions(position, Shard(index=i, count=2))["group"] for i in range(2)]
    evens, odds = -(-elements // 2), elements // 2
    assert began == [evens + 1, odds]


def test_commands_that_come_next_are_understood_and_mean_the_run(folder):
    settings = Settings.from_dict(presets.make("FLT", "tiny"))
    config = resolve(settings, vocab_size=4096)
    commands = task(folder).what_next(config)
    parsed = {program: cli.parse(program, flags) for program, *flags in commands.values()}
    assert list(parsed) == ["generate", "diagnose", "evaluate"]
    assert {args.checkpoint for args in parsed.values()} == {config.train.run_dir}
    assert parsed["generate"].loops == 8 and parsed["evaluate"].loops == (1, 2, 4, 8)
    (prompt,) = parsed["generate"].prompt
    assert prompt in config.train.sample_prompts and prompt.isprintable()
    assert parsed["evaluate"].modes == ("bpb", "sample")
    assert parsed["evaluate"].eval_tokens == config.train.eval_tokens
    bare = dataclasses.replace(config.train, sample_prompts=("two\nlines",))
    _, *flags = next(iter(task(folder).what_next(dataclasses.replace(config, train=bare)).values()))
    assert cli.parse("generate", flags).prompt is None
