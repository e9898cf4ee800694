"""Checkpoints: exact, atomic, and refused where they do not belong."""

import copy
import dataclasses
import errno
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from looped_jax.config.settings import MeshConfig, ModelSettings, Settings
from looped_jax.errors import CheckpointError
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import checkpoint, fingerprint, optimizers, train_step
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.run_meta import RunMeta

CONFIG = resolve(
    Settings(
        model=ModelSettings(layers=2, loops=2, width=32, heads=2, seq_len=16, dtype="float32")
    ),
    vocab_size=97,
)
OPTIMIZER = optimizers.make_optimizer(CONFIG, steps=10)
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 4, 17)).astype(np.int32)


def mesh_of(*sizes):
    return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


@functools.cache
def step_on(mesh):
    return train_step.make_train_step(CONFIG, OPTIMIZER, mesh)


def stepped(mesh, steps):
    current = train_step.create(CONFIG, OPTIMIZER, mesh)
    for _ in range(steps):
        current, _ = step_on(mesh)(current, TOKENS)
    return current


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_restored_state_is_bit_equal_on_another_mesh(tmp_path, sizes):
    saved = stepped(mesh_of(*sizes), 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, saved, RunMeta(step=2, positions=[{"row": 7}]))
    checkpoints.wait()
    other = mesh_of(1, 4, 2)
    again = Checkpoints(tmp_path)
    assert again.latest() == 2 and again.meta(2) == RunMeta(step=2, positions=[{"row": 7}])
    restored = again.restore(2, train_step.abstract(CONFIG, OPTIMIZER, other))
    assert_same(saved, restored)
    assert restored.params["head"].sharding.spec == P("fsdp", "tensor")


def test_saving_copies_before_the_next_step_reuses_the_memory(tmp_path):
    mesh = mesh_of(1, 1, 1)
    current = stepped(mesh, 1)
    expected = jax.tree.map(np.array, current)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, current, RunMeta(step=1))
    for _ in range(5):  # the state is donated while the save is still writing
        current, _ = step_on(mesh)(current, TOKENS)
    checkpoints.wait()
    assert_same(expected, checkpoints.restore(1, train_step.abstract(CONFIG, OPTIMIZER, mesh)))


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    current = stepped(mesh_of(1, 1, 1), 0)
    for step in (1, 2, 3):
        checkpoints.save(step, current, RunMeta(step=step))
    checkpoints.wait()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()) == ["2", "3"]


def test_an_older_one_that_a_crash_left_goes_with_the_next_save(tmp_path):
    """A process may die after a save has its name and before the one before it is removed."""
    current = stepped(mesh_of(1, 1, 1), 0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, current, RunMeta(step=step))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 2
        checkpoints.save(3, current, RunMeta(step=3))
    assert checkpoint.saved_steps(tmp_path) == [3]


def test_a_damaged_checkpoint_is_named_and_the_one_before_still_works(tmp_path):
    mesh = mesh_of(1, 1, 1)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, stepped(mesh, step), RunMeta(step=step))
    checkpoints.wait()
    for path in (tmp_path / "checkpoints" / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * 10)
    again, shapes = Checkpoints(tmp_path), train_step.abstract(CONFIG, OPTIMIZER, mesh)
    for read in (again.meta, lambda step: again.restore(step, shapes)):
        with pytest.raises(CheckpointError, match=r"checkpoints/2 is damaged .*move that"):
            read(2)
    assert again.meta(1) == RunMeta(step=1)
    assert_same(stepped(mesh, 1), again.restore(1, shapes))


def test_what_says_nothing_about_the_files_advises_to_keep_them(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, stepped(mesh_of(1, 1, 1), 1), RunMeta(step=1))
        checkpoints.wait()

        def fails(*_, **__):
            raise OSError(errno.ESTALE, "Stale file handle")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "restore", fails)
            with pytest.raises(CheckpointError, match=r"Stale file handle.*keep it and try again"):
                checkpoints.meta(1)


def test_the_error_that_ends_a_run_is_not_replaced_by_that_of_a_save(tmp_path, monkeypatch):
    def fails(self):
        raise CheckpointError("no space")

    monkeypatch.setattr(Checkpoints, "wait", fails)
    with pytest.raises(ZeroDivisionError) as raised, Checkpoints(tmp_path):
        1 / 0  # noqa: B018
    assert raised.value.__notes__ == ["no space"]
    with pytest.raises(CheckpointError, match="no space"), Checkpoints(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(
        CheckpointError, match=r"train.run_dir: .*file/run.*cannot be written.*give another"
    ):
        Checkpoints(blocked / "run")


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path):
    """A limit on file sizes fails writes as a full disk does, in a process of its own."""
    import subprocess
    import sys

    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(checkpoint.__file__.rsplit("looped_jax", 1)[0])!r})
from tests import conftest
from tests.training.test_checkpoint import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints({str(tmp_path)!r}, keep=1)
current = stepped(mesh_of(1, 1, 1), 1)
checkpoints.save(1, current, RunMeta(step=1))
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, current, RunMeta(step=2))
    checkpoints.wait()
except CheckpointError as error:
    print("CAUGHT", error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "CAUGHT" in run.stdout, run.stdout + run.stderr
    message = run.stdout.split("CAUGHT ")[1]
    assert "the checkpoint of step 1 is intact" in message and str(tmp_path) in message
    again = Checkpoints(tmp_path)
    assert again.latest() == 1
    mesh = mesh_of(1, 1, 1)
    assert_same(stepped(mesh, 1), again.restore(1, train_step.abstract(CONFIG, OPTIMIZER, mesh)))


def test_identity_differences_are_spelled_out():
    ours = fingerprint.of(
        CONFIG, rows={"data": {"shards": ["a"]}, "tokenizer": {"sha": "x"}}, hosts=1
    )
    deeper = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, loops=3))
    theirs = fingerprint.of(
        deeper, rows={"data": {"shards": ["b"]}, "tokenizer": {"sha": "x"}}, hosts=2
    )
    fingerprint.check(ours, ours, run_dir="runs/a")
    with pytest.raises(CheckpointError) as error:
        fingerprint.check(theirs, ours, run_dir="runs/a")
    for part in (
        "runs/a holds another run",
        "model.loops: 3 there, 2 here",
        "data.shards: ['b'] there, ['a'] here",
        "data.hosts: 2 there, 1 here",
    ):
        assert part in str(error.value)
    assert "tokenizer" not in str(error.value)


def test_settings_that_came_later_refuse_no_older_run():
    now = fingerprint.of(CONFIG, rows={"data": {}, "tokenizer": {}}, hosts=1)
    before = copy.deepcopy(now)
    del before["optim"]["vector_learning_rate"], before["model"]["loss"]  # as if not invented yet
    fingerprint.check(before, now, run_dir="runs/a")
    changed = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, loss="STEP"))
    other = fingerprint.of(changed, rows={"data": {}, "tokenizer": {}}, hosts=1)
    with pytest.raises(CheckpointError, match="model.loss: 'END' there, 'STEP' here"):
        fingerprint.check(before, other, run_dir="runs/a")


def test_long_differences_are_cut_and_counted():
    now = fingerprint.of(CONFIG, rows={"data": {"shards": ["x" * 99]}, "tokenizer": {}}, hosts=1)
    many = {f"k{n}": n for n in range(7)} | {"shards": ["y" * 99]}
    other = fingerprint.of(CONFIG, rows={"data": many, "tokenizer": {}}, hosts=1)
    with pytest.raises(CheckpointError, match="; and 3 more") as error:
        fingerprint.check(now, other, run_dir="runs/a")
    assert len(str(error.value)) < 500


def test_speed_settings_are_not_part_of_the_identity():
    quick = dataclasses.replace(CONFIG.model, remat="none", loss_chunk=7, kernel="xla")
    quicker = dataclasses.replace(CONFIG, model=quick)
    made = [
        fingerprint.of(c, rows={"data": {}, "tokenizer": {}}, hosts=1) for c in (CONFIG, quicker)
    ]
    assert made[0] == made[1]


def test_leftovers_are_removed_by_who_writes_and_left_by_who_reads(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        Checkpoints(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, stepped(mesh_of(1, 1, 1), 1), RunMeta(step=1))
    leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-1"
    leftover.mkdir()  # half written by a run that may be going on
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.latest() == 1 and leftover.exists()
    with Checkpoints(tmp_path) as writer:
        assert writer.latest() == 1 and not leftover.exists()
