"""Several processes on one machine as a cluster: they train as one, die as one, and come back."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from looped_jax.config.settings import MeshConfig, Settings
from looped_jax.data.packing.stream import Stream
from looped_jax.errors import CheckpointError, ConfigError
from looped_jax.runtime import distributed, sharding
from looped_jax.training import fingerprint, optimizers, train_step
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.run_folder import read_config
from tests import QUICK
from tests.programs import ROOT, entries, losses
from tests.programs import start as start_one
from tests.test_train import until

STEPS = 16


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(
    home, run_dir, *overrides, of_last=(), processes=2, mesh="data=-1", steps=STEPS,
    program=("-m", "looped_jax.train"),
):  # fmt: skip
    """`processes` × 8 / `processes` fake devices; a list of running programs.

    The last of them also has the overrides `of_last`.
    """
    port = free_port()
    sizes = [f"--config.mesh.{part}" for part in mesh.split()]
    settings = (
        "--config.train.save_every=5", "--config.train.batch_size=1", "--config.train.eval_every=8",
        "--config.model.heads=2", "--config.data.shuffle_seed=None",
    )  # fmt: skip
    return [
        start_one(
            home, run_dir, *settings, *sizes, *overrides,
            *(of_last if process == processes - 1 else ()), steps=steps, program=program,
            environment={
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes} {QUICK}",
                "LOOPED_JAX_HEARTBEAT": "10",
                **({
                    "LOOPED_JAX_COORDINATOR": f"localhost:{port}",
                    "LOOPED_JAX_PROCESSES": str(processes),
                    "LOOPED_JAX_PROCESS": str(process),
                } if processes > 1 else {}),
            },
        )
        for process in range(processes)
    ]  # fmt: skip


def finish(programs):
    answers = [program.communicate(timeout=240) for program in programs]
    return [p.returncode for p in programs], [out for out, _ in answers], [e for _, e in answers]


def wait_for(program, text):
    for line in program.stdout:
        if text in line:
            return
    raise AssertionError(program.stderr.read())


def final(run_dir, step=STEPS):
    """Every array of a checkpoint, optimizer included, on one device."""
    config = read_config(run_dir)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optimizers.make_optimizer(config)
    checkpoints = Checkpoints(run_dir)
    assert checkpoints.latest() == step
    return checkpoints.restore(step, train_step.abstract(config, optimizer, mesh))


def assert_same_run(left, right):
    for a, b in zip(jax.tree.leaves(final(left)), jax.tree.leaves(final(right)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def uninterrupted(home, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    codes, out, err = finish(start(home, run_dir, mesh="data=4 fsdp=2"))
    assert codes == [0, 0], err
    return run_dir, out


def test_two_processes_train_one_run(uninterrupted):
    run_dir, (first, second) = uninterrupted
    assert "2 processes, 2 of which read different rows" in first
    assert "validation bits per byte" in first and "sample: " in first
    assert "step " not in second  # one process speaks
    assert list(losses(run_dir)) == list(range(1, STEPS + 1))
    meta = Checkpoints(run_dir).meta(STEPS)
    assert len(meta.positions) == 2 and meta.positions[0] != meta.positions[1]
    assert len(list((run_dir / "tensorboard").glob("events.*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_last", "difference"),
    [
        ("--config.train.eval_every=9", "train.eval_every is 9, not 8, in process 1 on "),
        ("--config.data.path={less}", "data.train is without b.parquet in process 1 on "),
        ("--config.data.path={none}", "data.path: there is no folder or file {none}"),
        ("--config.train.run_dir={own}", "{own} is not the folder that process 0 has"),
    ],
)  # fmt: skip
def test_before_the_first_step_all_end_for_what_one_process_has_otherwise(
    home, tmp_path, of_last, difference
):
    paths = {name: tmp_path / name for name in ("less", "none", "own")}
    shutil.copytree(home / "text", paths["less"])
    (paths["less"] / "b.parquet").unlink()
    given = of_last.format(**paths)
    codes, out, err = finish(start(home, tmp_path / "run", of_last=[given]))
    assert codes == [1, 1]
    assert "compiled" not in out[0]
    for each in err:
        assert difference.format(**paths) in each and "error: " in each
    assert "process 1 on " in err[0]


LATE = """
import time, jax
from looped_jax.runtime import distributed
with distributed.joined():
    distributed.gather_json("here")
    if jax.process_index() == 0:
        time.sleep(12)
"""


@pytest.mark.slow
def test_who_is_done_waits_longer_than_a_heartbeat_for_the_last_one():
    address = f"localhost:{free_port()}"
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", LATE], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "LOOPED_JAX_HEARTBEAT": "5", "LOOPED_JAX_COORDINATOR": address,
                 "LOOPED_JAX_PROCESSES": "2", "LOOPED_JAX_PROCESS": str(process)},
        )
        for process in range(2)
    ]  # fmt: skip
    codes, _, err = finish(programs)
    assert codes == [0, 0], err


WAITS_FOR_ROWS = """
import time, jax
from looped_jax import train
join = train.RowDraws.join
def slowly(self, rows, step):
    if step == 3 and jax.process_index() == 1:
        time.sleep(12)
    return join(self, rows, step)
train.RowDraws.join = slowly
train.main()
"""


@pytest.mark.slow
def test_a_process_that_waits_is_named_by_the_alarm_and_in_the_log(home, tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS_FOR_ROWS)
    often = "--config.train.stall_minutes=0.1", "--config.train.eval_every=0"
    programs = start(home, tmp_path / "run", *often, program=[script], steps=4)
    codes, out, err = finish(programs)
    assert codes == [0, 0], err
    late = (
        r"no progress for 0.\d minutes: process 1 on \S+ at step 3, waiting for rows; process 0 on"
    )
    assert re.search(late, out[0]), out[0]
    assert "it goes on, after 0." in out[0] and "no progress" not in out[1]
    assert not (tmp_path / "run" / "stalls").exists()
    found = {e["step"]: e["processes/data_wait_seconds"] for e in entries(tmp_path / "run")
             if "processes/data_wait_seconds" in e}  # fmt: skip
    assert list(found) == [1, 2, 3, 4]
    assert found[3]["process"] == 1 and found[3]["worst"] > 11 > found[2]["worst"]
    assert found[3]["mean"] == pytest.approx(found[3]["worst"] / 2, rel=0.2)
    assert "step 3 of 2 processes, mean and worst: wait " in out[0]


@pytest.mark.slow
def test_after_a_death_the_others_end_soon_and_the_run_goes_on(home, uninterrupted, tmp_path):
    programs = start(home, tmp_path, mesh="data=4 fsdp=2")
    wait_for(programs[0], "step 7/")
    until((tmp_path / "checkpoints" / "5").is_dir)  # it is written beside the steps
    programs[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, _, err = finish(programs)
    assert time.monotonic() - began < 60
    assert codes[0] not in (0, None) and codes[1] == -signal.SIGKILL
    assert "another task died" in err[0] or "tasks have crashed" in err[0], err[0]
    codes, out, err = finish(start(home, tmp_path, mesh="data=4 fsdp=2"))
    assert codes == [0, 0], err
    assert "continuing" in out[0]
    assert_same_run(tmp_path, uninterrupted[0])


@pytest.mark.slow
def test_one_signal_stops_all_at_one_step_and_the_run_goes_on(home, uninterrupted, tmp_path):
    programs = start(home, tmp_path, mesh="data=4 fsdp=2")
    wait_for(programs[0], "step 3/")
    for program in programs:  # a preempted job gets it everywhere, not at the same moment
        program.send_signal(signal.SIGTERM)
    codes, out, err = finish(programs)
    assert codes == [75, 75], err
    stopped_at = int(out[0].split("stopped by a signal after step ")[1].split(",")[0])
    assert 3 <= stopped_at < STEPS and Checkpoints(tmp_path).latest() == stopped_at
    codes, _, err = finish(start(home, tmp_path, mesh="data=4 fsdp=2"))
    assert codes == [0, 0], err
    assert_same_run(tmp_path, uninterrupted[0])


@pytest.mark.slow
def test_minutes_save_all_processes_at_one_step_and_samples_are_drawn(
    home, uninterrupted, tmp_path
):
    """Had they disagreed, each would wait in a save that the other never joins."""
    often = ("--config.train.save_every=0", "--config.train.save_minutes=0.0005",
             "--config.train.keep=100", "--config.train.sample_every=8")  # fmt: skip
    codes, out, err = finish(start(home, tmp_path, *often, mesh="data=4 fsdp=2"))
    assert codes == [0, 0], err
    steps = {int(path.name) for path in tmp_path.glob("checkpoints/[0-9]*")}
    assert len(steps) > 2
    assert out[0].count("step 8 sample: ") == 4 and "sample: " not in out[1]
    assert_same_run(tmp_path, uninterrupted[0])


@pytest.mark.slow
def test_a_tensor_axis_across_processes_reads_the_text_of_one(home, tmp_path):
    """Eight devices of two processes share every row; a single device must see the same run."""
    sizes = (
        "--config.model.width=64", "--config.model.heads=8", "--config.train.batch_size=16",
        "--config.data.shuffle_seed=None",
    )  # fmt: skip
    programs = start(home, tmp_path / "moved", *sizes, mesh="tensor=8")
    wait_for(programs[0], "step 4/")
    programs[1].send_signal(signal.SIGTERM)
    codes, out, err = finish(programs)
    assert codes == [75, 75], err
    single = "--config.train.save_every=5"  # one device, first for all of it, then for the rest
    alone = [
        start_one(home, tmp_path / run, *sizes, single, steps=STEPS) for run in ("one", "moved")
    ]
    codes, out, err = finish(alone)
    assert codes == [0, 0], err
    assert "continuing" not in out[0] and "continuing" in out[1]
    moved, one = losses(tmp_path / "moved"), losses(tmp_path / "one")
    assert list(moved) == list(one) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(moved.values()), list(one.values()), atol=1e-4)


@pytest.mark.slow
def test_another_number_of_hosts_is_refused_or_followed(home, tmp_path):
    mesh = "data=4 fsdp=2"
    programs = start(home, tmp_path, mesh=mesh)
    wait_for(programs[0], "step 4/")
    programs[0].send_signal(signal.SIGTERM)  # one of them is enough
    assert finish(programs)[0] == [75, 75]
    codes, _, err = finish(start(home, tmp_path, mesh=mesh, processes=1))
    assert codes == [1]
    assert "2 hosts read its text, now 1 would" in err[0] and "data.allow_host_change" in err[0]
    more = "--config.data.allow_host_change=True"
    codes, out, err = finish(start(home, tmp_path, more, mesh=mesh, processes=1))
    assert codes == [0], err
    assert "rows go on where 2 hosts left them, now in the order of 1" in out[0]
    assert sorted(losses(tmp_path)) == list(range(1, STEPS + 1))
    assert len(Checkpoints(tmp_path).meta(STEPS).positions) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_followers_begin_at_the_first_unfinished_row_group(count):
    positions = [{"group": 4}, {"group": 5}, {"group": 4}]  # of 13: row groups 12, next 1, 14 → 14
    began = [Stream().remap_positions(positions, [13], index=i, count=count) for i in range(count)]
    own = [[g for epoch in range(3) for g in range(epoch * 13 + i, epoch * 13 + 13, count)]
           for i in range(count)]  # fmt: skip
    first = [own[i][place["group"]] for i, place in enumerate(began)]
    assert min(first) == 12 and max(first) < 12 + count + 1
    assert len(set(first)) == count
    assert all(place["cursor"] == 0 and place["head"] == [] for place in began)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LOOPED_JAX_COORDINATOR": "a:1"}, "LOOPED_JAX_PROCESSES, LOOPED_JAX_PROCESS"),
        ({"LOOPED_JAX_COORDINATOR": "a", "LOOPED_JAX_PROCESSES": "2", "LOOPED_JAX_PROCESS": "0"},
         "has no port"),
        ({"LOOPED_JAX_COORDINATOR": "a:1", "LOOPED_JAX_PROCESSES": "2", "LOOPED_JAX_PROCESS": "2"},
         "LOOPED_JAX_PROCESS=2 is none of 0 to 1"),
        ({"LOOPED_JAX_HEARTBEAT": "soon"}, "LOOPED_JAX_HEARTBEAT='soon' is no whole number"),
    ],
)  # fmt: skip
def test_surroundings_that_make_no_sense_are_named(environment, message):
    with pytest.raises(ConfigError, match=message):
        distributed.initialize(environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, None),  # a shell of salloc, not a step
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, {}),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
         {"local_device_ids": [0, 1, 2, 3]}),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "host-0"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, {}),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook in a cluster
        ({"LOOPED_JAX_CLUSTER": "auto"}, {}),
        ({"LOOPED_JAX_COORDINATOR": "h:12", "LOOPED_JAX_PROCESSES": "3", "LOOPED_JAX_PROCESS": "1"},
         {"coordinator_address": "h:12", "num_processes": 3, "process_id": 1,
          "cluster_detection_method": "deactivate"}),
    ],
)  # fmt: skip
def test_who_joins_and_how(environment, expected, monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: joined.append(settings))
    distributed.initialize(environment)
    if expected is None:
        assert not joined
    else:
        timing = {"heartbeat_timeout_seconds": 60, "shutdown_timeout_seconds": 60}
        assert joined == [timing | expected]


def test_an_unreachable_coordinator_is_named():
    program = subprocess.run(
        [sys.executable, "-c",
         "import jax; from looped_jax.runtime import distributed\n"
         "def fail(**_): raise RuntimeError('no route')\n"
         "jax.distributed.initialize = fail\n"
         "distributed.initialize({'LOOPED_JAX_CLUSTER': 'auto'})"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "did not meet (no route)" in program.stderr


def test_hosts_are_part_of_the_identity():
    config = Settings()
    made = [fingerprint.of(config, rows={"data": {}, "tokenizer": {}}, hosts=n) for n in (1, 2)]
    with pytest.raises(CheckpointError, match="2 hosts read its text, now 1 would"):
        fingerprint.check(made[1], made[0], run_dir="runs/a")
