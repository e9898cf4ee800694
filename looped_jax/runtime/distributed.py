"""Several processes as one run: joining, what all have to know, and stopping together.

The engine is JAX's own: its coordination service finds the processes, watches their heartbeats and
agrees on the step at which a preempted run stops.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from looped_jax.errors import ConfigError

EXPLICIT = ("LOOPED_JAX_COORDINATOR", "LOOPED_JAX_PROCESSES", "LOOPED_JAX_PROCESS")
HEARTBEAT_SECONDS = 60  # of silence, then a process counts as dead


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """`initialize` before the block, and after it leave together, whenever the last one is done.

    JAX alone would end all of them, and a run that was complete with an error, when one came later
    to the end than the heartbeat's time after another: process 0 draws and writes for all.
    """
    initialize()
    yield
    if jax.process_count() > 1 and jax.distributed.is_initialized():
        multihost_utils.sync_global_devices("the end")  # heartbeats go on meanwhile
        jax.distributed.shutdown()


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run where the environment tells of any; call it first.

    Explicit: LOOPED_JAX_COORDINATOR=host:port of process 0, LOOPED_JAX_PROCESSES=n,
    LOOPED_JAX_PROCESS=i, and optionally LOOPED_JAX_HEARTBEAT=seconds. Else what JAX itself
    recognises: a SLURM step or Open MPI job of several tasks, a TPU pod slice that names its hosts,
    an indexed Kubernetes job, or anything with LOOPED_JAX_CLUSTER=auto. Should a process die, the
    service ends the others within the heartbeat's time. Raises ConfigError.
    """
    heartbeat = _number(environment, "LOOPED_JAX_HEARTBEAT", HEARTBEAT_SECONDS)
    given = [name for name in EXPLICIT if name in environment]
    if given and len(given) < len(EXPLICIT):
        missing = ", ".join(name for name in EXPLICIT if name not in given)
        raise ConfigError(f"{given[0]} is set, but not {missing}; set all three or none")
    settings: dict[str, Any] = {
        "heartbeat_timeout_seconds": heartbeat,
        "shutdown_timeout_seconds": heartbeat,
    }
    if given:
        address, (count, process) = (
            environment[EXPLICIT[0]],
            (_number(environment, name) for name in EXPLICIT[1:]),
        )
        if not address.rpartition(":")[2].isdigit():
            raise ConfigError(f"{EXPLICIT[0]}={address!r} has no port; give it as host:port")
        if not 0 <= process < count:
            raise ConfigError(f"{EXPLICIT[2]}={process} is none of 0 to {count - 1}; correct it")
        settings |= {
            "coordinator_address": address,
            "num_processes": count,
            "process_id": process,
            "cluster_detection_method": "deactivate",
        }
    elif not _in_cluster(environment):
        return
    elif (devices := _all_devices_of_the_node(environment)) is not None:
        settings["local_device_ids"] = devices
    try:
        jax.distributed.initialize(**settings)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the processes of this run did not meet ({reason}); start all of them, and let "
            f"{EXPLICIT[0]} or the cluster name a port that is free and reachable"
        ) from error


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} is no whole number; give one")
    return int(text)


def _in_cluster(environment: Mapping[str, str]) -> bool:
    several_tasks = any(
        int(environment.get(name) or 1) > 1
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    return (
        several_tasks
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
        or environment.get("LOOPED_JAX_CLUSTER") == "auto"
    )


def _all_devices_of_the_node(environment: Mapping[str, str]) -> list[int] | None:
    """With one SLURM task per node: all its GPUs, where JAX would give the task only the first."""
    tasks, nodes = (environment.get(f"SLURM_STEP_NUM_{name}") for name in ("TASKS", "NODES"))
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if tasks == nodes and gpus.isdigit() else None


def check_joined() -> None:
    """Raise ConfigError when devices of other processes are seen but the processes never met."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"this is one of {jax.process_count()} processes, which have not joined; set "
            f"LOOPED_JAX_CLUSTER=auto or {', '.join(EXPLICIT)}"
        )


def gather_json(value: Any) -> list[Any]:
    """The JSON `value` of every process, in their order, known to all of them."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(len(mine))))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(mine)] = mine
    everyones = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(everyones, sizes, strict=True)]


def gather_later(mine: np.ndarray) -> jax.Array:
    """[processes, …] of every process's array; only who reads it waits for the devices.

    All processes call it in the same order, with the same shape and type.
    """
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = Mesh(devices, ("processes", "local_devices"))
    rows = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("processes")), mine[None], (len(devices), *mine.shape)
    )
    return _replicated(mesh)(rows)


@functools.cache
def _replicated(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, PartitionSpec()))


def process_sum(array: np.ndarray) -> np.ndarray:
    """Sum of an array over all processes."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.process_allgather(array)).sum(axis=0)


class StopSignal:
    """Remembers a SIGTERM or SIGINT, so that the run can save and leave between two steps.

    With several processes, one signal to one of them stops all of them after the same step.
    """

    def __init__(self) -> None:
        self._requested = False
        self._together = jax.process_count() > 1
        if self._together:
            # SIGTERM belongs to JAX's preemption service, which tells the others.
            acts = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        else:
            acts = dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._remember)
        self._before = {number: signal.signal(number, act) for number, act in acts.items()}

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; all processes ask after every step, and agree."""
        if self._together:
            self._requested |= multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def close(self) -> None:
        """Let signals do what they did before: a notebook goes on after its run."""
        for number, act in self._before.items():
            if act is not None:  # what was not set by Python cannot be set again
                signal.signal(number, act)

    def _remember(self, number: int, frame: Any) -> None:
        self._requested = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once
