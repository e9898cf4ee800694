"""Generated rows: the same whoever asks for them, other ones to test with, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from looped_jax.config.registry import TASKS
from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.model import transformer
from looped_jax.resolve import resolve
from looped_jax.runtime.sharding import EVERYTHING, Shard

LENGTHS = {  # of a row with the default settings
    "chain_end": 32, "hops": 24, "steps": 25, "p_hop": 256, "addition": 132, "word_problem": 64,
    "mano": 23, "brevo": 625, "depo": 960,
}  # fmt: skip


def task(name, *, seq_len=None, seed=0, model=None, data=None, **own):
    """The task of that name and the config of a run on it."""
    settings = Settings.from_dict(
        {
            "model": {"layers": 1, "loops": 4, "width": 32, "heads": 2, "loss": "STEP"}
            | {"seq_len": seq_len or LENGTHS[name]}
            | (model or {}),
            "data": {"task": name, "tasks": {name: own}} | (data or {}),
            "train": {"seed": seed, "eval_tokens": 1000},
        }
    )
    found = TASKS[name](settings)
    return found, resolve(settings, vocab_size=found.vocab_size)


def batches(name, count, *, batch_size=8, shard=EVERYTHING, start=0, **given):
    found, config = task(name, **given)
    rows = found.train_rows(config, batch_size=batch_size, shard=shard)
    rows.set_state({"batch": start})
    taken = [next(rows) for _ in range(count)]
    rows.close()
    return taken


def together(taken):
    return {name: np.concatenate([batch[name] for batch in taken]) for name in taken[0]}


def equal(first, second):
    return all(np.array_equal(first[name], second[name]) for name in first)


def judged_rows(name, count, *, test, loops=(1,), **given):
    """The task and some of its rows that are judged."""
    found, _ = task(name, **given)
    rows = found._rows(0, test=test, loops=loops)
    return found, [rows[number] for number in range(count)]


@pytest.mark.parametrize("name", LENGTHS)
def test_rows_are_what_the_task_says_and_follow_from_their_number(name):
    found, config = task(name)
    whole = batches(name, 4)
    for key, shape in found.row_shapes(config).items():
        assert whole[0][key].shape == (8, *shape.shape) and whole[0][key].dtype == shape.dtype
    assert whole[0]["inputs"].min() >= 0
    assert max(array.max() for batch in whole for array in batch.values()) < found.vocab_size
    resumed = batches(name, 2, start=2)
    assert all(equal(*pair) for pair in zip(resumed, whole[2:], strict=True))
    longer = batches(name, 2, batch_size=16)
    assert equal(together(longer), together(whole))
    hosts = [batches(name, 4, batch_size=4, shard=Shard(i, 2)) for i in range(2)]
    for step, batch in enumerate(whole):
        for host in range(2):
            assert equal(hosts[host][step], {n: a[host::2] for n, a in batch.items()})


@pytest.mark.parametrize("name", sorted(LENGTHS.keys() - {"mano"}))  # its shortest rows are few
def test_other_seeds_and_tests_have_other_rows(name):
    found, config = task(name)
    trained, other = (together(batches(name, 8, seed=seed)) for seed in (0, 1))
    drawn = {row.tobytes() for row in trained["inputs"]}
    assert len(drawn) == 64
    assert not drawn & {row.tobytes() for row in other["inputs"]}
    for test in (True, False):
        judged = found.validation_rows(test=test, loops=(1, 4), most=1000)
        assert not drawn & {row.inputs.tobytes() for row in judged}
        again = task(name, seed=7)[0].validation_rows(test=test, loops=(1, 4), most=1000)
        assert all(
            np.array_equal(a, b)
            for one, two in zip(judged, again, strict=True)
            for a, b in zip(one, two, strict=True)
        )
        owed = sum((row.difficulty >= 0).sum() for row in judged)
        assert 900 < owed <= 1000
        before = len(drawn)
        drawn |= {row.inputs.tobytes() for row in judged}
        assert len(drawn) == before + len(judged)


def test_a_position_is_json_and_the_same_for_any_number_of_hosts():
    found, config = task("hops")
    rows = found.train_rows(config, batch_size=4, shard=Shard(0, 2))
    next(rows), next(rows)
    state = json.loads(json.dumps(rows.get_state()))
    rows.close()
    assert state == {"batch": 2}
    assert found.remap_positions([state, state], Shard(0, 1)) == state
    assert found.epochs(state, Shard(0, 1)) is None


def test_a_trained_model_has_the_task_it_was_trained_on():
    found, config = task("chain_end", nodes=8, seq_len=16)
    params = transformer.init_shapes(config.model)
    model = TrainedModel(config, {n: np.zeros(p.shape) for n, p in params.items()}, None, step=1)
    assert model.task.fingerprint() == found.fingerprint() and model.task is model.task
    rows = [t.validation_rows(test=True, loops=(4,), most=64) for t in (model.task, found)]
    assert all(np.array_equal(one.inputs, two.inputs) for one, two in zip(*rows, strict=True))


@pytest.mark.slow
def test_workers_change_nothing():
    assert equal(together(batches("hops", 3)), together(batches("hops", 3, data={"workers": 2})))


def test_what_two_runs_share_is_the_task_and_its_settings():
    assert task("hops", nodes=9, seq_len=25)[0].fingerprint() == {
        "data": {"task": "hops", "nodes": 9, "distance": 4, "queries": 16}
    }


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("hops", {"seq_len": 1024}, "model.seq_len=1024: .* has 24 tokens .* model.seq_len=24"),
        ("hops", {"nodes": 9}, "model.seq_len=24: .* model.seq_len=25"),
        ("hops", {"nodes": 1}, "data.tasks.hops.nodes=1 is out of range; give 2 or more"),
        ("hops", {"queries": 0}, "data.tasks.hops.queries=0 is out of range"),
        (
            "chain_end",
            {"test_chains": 3},
            "test_chains=3 does not divide nodes=16 .* 1, 2, 4, 8 or 16",
        ),
        ("chain_end", {"distance": -1}, "data.tasks.chain_end.distance=-1 is out of range"),
        (
            "steps",
            {"model": {"loss": "END"}},
            "model.loss=END reads one loop of 4, .* give model.loss=STEP",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(name, given, message):
    with pytest.raises(ConfigError, match=message):
        task(name, **given)


def test_too_few_targets_to_judge_by_are_refused():
    with pytest.raises(ConfigError, match="train.eval_tokens=15 is less than the 16 targets"):
        task("hops")[0].validation_rows(test=True, loops=(1,), most=15)


def test_the_task_of_contributing_is_one():
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text("utf-8")
    (code,) = [part for part in page.split("```python\n") if 'register("parity")' in part]
    exec(code.split("```")[0], {"__name__": "own"})
    try:
        found, (row, *_) = judged_rows("parity", 3, test=True, seq_len=16)
        assert row.targets.tolist() == [row.inputs[: n + 1].sum() % 2 for n in range(16)]
        assert row.inputs.dtype == row.targets.dtype == np.int32
        settings = Settings.from_dict({"data": {"tasks": {"parity": {"length": 4}}}})
        assert settings.data.tasks["parity"].length == 4
    finally:
        del TASKS._found["parity"]
