"""A task of one's own, whose rows are no text: it trains, is judged, resumes, and is named."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

import looped_jax
from looped_jax import train
from looped_jax.config.registry import TASKS
from looped_jax.config.settings import Settings, all_settings
from looped_jax.errors import CheckpointError, ConfigError
from looped_jax.evaluation import scoring
from looped_jax.resolve import run_name
from looped_jax.runtime import sharding
from looped_jax.tasks.task import Task
from tests.programs import entries, use_few_devices

VOCABULARY = 17


@dataclass(frozen=True)
class CountSettings:
    stride: int = 3


class CountRows:
    """Numbers in a circle. Loop k owes what stands k + 1 strides further."""

    def __init__(self, config, stride, batch_size, shard):
        self.model, self.stride, self.batch_size, self.shard = (
            config.model, stride, batch_size, shard,
        )  # fmt: skip
        self.seed, self.batch = config.train.seed, 0

    def __iter__(self):
        return self

    def __next__(self):
        size = self.batch_size * self.shard.count
        starts = np.random.default_rng([self.seed, self.batch]).integers(0, VOCABULARY, size)
        mine = starts[self.shard.index :: self.shard.count, None]
        inputs = (mine + np.arange(self.model.seq_len)) % VOCABULARY
        owed = self.stride * np.arange(1, self.model.loops + 1)
        self.batch += 1
        return {
            "inputs": inputs.astype(np.int32),
            "targets": ((inputs[:, None] + owed[:, None]) % VOCABULARY).astype(np.int32),
        }

    def get_state(self):
        return {"batch": self.batch}

    def set_state(self, state):
        self.batch = state["batch"]

    def close(self):
        pass


class CountJudge:
    def __init__(self, rows, config, mesh, loop_counts):
        self.batch, self.mesh, self.loop_counts = next(rows), mesh, loop_counts
        self.score = scoring.make_score_step(config.model, mesh, loop_counts)

    def __call__(self, params):
        spec = sharding.batch_sharding(self.mesh).spec[1:]
        last = self.batch["inputs"], self.batch["targets"][:, -1]
        arrays = (sharding.put(a, self.mesh, jax.P(*spec)) for a in last)
        ones = sharding.put(np.ones(VOCABULARY, np.int32), self.mesh, jax.P())
        nats, count = jax.device_get(self.score(params, *arrays, ones))
        means = (nats / count).tolist()
        return {"loss": dict(zip(self.loop_counts, means, strict=True))}

    def describe(self, scores):
        return f"loss {scores['loss']}"


@pytest.fixture(scope="module", autouse=True)
def count():
    @TASKS.register("count")
    class Count(Task):
        """Counts onwards."""

        Settings = CountSettings
        vocab_size = VOCABULARY

        def __init__(self, settings):
            self.stride = settings.data.tasks["count"].stride

        def fingerprint(self):
            return {"data": {"task": "count", "stride": self.stride}}

        def row_shapes(self, config):
            m = config.model
            shapes = {"inputs": (m.seq_len,), "targets": (m.loops, m.seq_len)}
            return {n: jax.ShapeDtypeStruct(shape, np.int32) for n, shape in shapes.items()}

        def train_rows(self, config, *, batch_size, shard=sharding.EVERYTHING):
            return CountRows(config, self.stride, batch_size, shard)

        def judge(self, config, mesh, *, loop_counts, shard=sharding.EVERYTHING):
            return CountJudge(self.train_rows(config, batch_size=8), config, mesh, loop_counts)

    yield Count
    del TASKS._found["count"]


def settings(run_dir, *, steps=8, mesh=(1, 1, 1), **data):
    model = {"layers": 1, "loops": 2, "width": 32, "heads": 2, "seq_len": 8, "dtype": "float32"}
    return Settings.from_dict(
        {
            "model": model | {"loss": "STEP"},
            "optim": {"newton_schulz_dtype": "float32", "warmdown_ratio": 0.0},
            "data": {"task": "count"} | data,
            "mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)),
            "train": {
                "steps": steps, "run_dir": str(run_dir), "tokens_per_step": 128, "batch_size": 2,
                "eval_every": 4, "save_every": 4, "eval_loops": (1, 2, 3),
            },
        }
    )  # fmt: skip


def scalars(folder, key):
    """By step."""
    return {line["step"]: line[key] for line in entries(folder) if key in line}


@pytest.fixture(scope="module", autouse=True)
def devices():
    with pytest.MonkeyPatch.context() as patch:
        use_few_devices(patch)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps on one device."""
    run_dir = tmp_path_factory.mktemp("whole")
    train.train(settings(run_dir))
    return run_dir


def test_it_learns_is_judged_and_opens(tmp_path):
    train.train(settings(tmp_path, steps=60))
    losses = scalars(tmp_path, "val/loss_loops_2")
    assert list(losses) == [*range(0, 61, 4)]
    assert losses[60] < 0.3 < 1 < losses[4]
    model = looped_jax.load(tmp_path)
    row = np.arange(8) % VOCABULARY
    one, two = (logits[0, 4:].argmax(-1) for logits in model.logits(row, loops=(1, 2)))
    np.testing.assert_array_equal(one, (row[4:] + 3) % VOCABULARY)  # a target of each loop
    np.testing.assert_array_equal(two, (row[4:] + 6) % VOCABULARY)


@pytest.mark.parametrize("mesh", [(2, 2, 1), (1, 2, 2)])
def test_meshes_change_nothing(whole, tmp_path, mesh):
    train.train(settings(tmp_path, mesh=mesh))
    one, many = (scalars(folder, "train/loop_loss") for folder in (whole, tmp_path))
    np.testing.assert_allclose(list(one.values()), list(many.values()), rtol=1e-4)


def test_it_goes_on_as_if_it_had_not_stopped(whole, tmp_path):
    train.train(settings(tmp_path, steps=5))
    train.train(settings(tmp_path))
    assert scalars(tmp_path, "train/loss") == scalars(whole, "train/loss")


def test_what_a_task_has_to_have_is_asked_for_when_it_is_made(count):
    class Unjudged(count):
        judge = Task.judge

    with pytest.raises(TypeError, match="abstract method.*judge"):
        Unjudged(Settings.from_dict({"data": {"task": "count"}}))


def test_its_settings_are_settings_and_part_of_the_run(whole):
    assert "data.tasks.count.stride" in all_settings()
    other = settings(whole, tasks={"count": {"stride": 5}})
    with pytest.raises(CheckpointError, match="data.stride: 3 there, 5 here"):
        train.train(other)
    names = {run_name(settings(whole)), run_name(other)}
    assert len(names) == 2 and all("count" in name for name in names)
    with pytest.raises(ConfigError, match="data.task='cuont' is unknown; choose .*text.* or count"):
        settings(whole, task="cuont")
