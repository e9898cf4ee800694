"""Worker processes that train runs, each on its own cores or GPU, one run after another.

A worker goes on with another seed of its row where there is one: it finds that program compiled.
One batched program for several seeds was measured to be slower on a CPU (docs/sweep.md), so every
seed is a run like any other.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags, logging

from looped_jax import cli
from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError, TrainingError, UserError
from looped_jax.experiments import throughput
from looped_jax.experiments.grid import Run
from looped_jax.runtime.compilation_cache import keep_compiled
from looped_jax.training import run_lock

ENDING = 60.0  # seconds in which a worker whose sweep was killed has saved and ended
CONSOLE = "console.txt"  # in the folder of a run: what training would have printed


@dataclass(frozen=True)
class Outcome:
    """How a run came back.

    failed: whether something else than its values stood in its way; message: what, or where values
    were no longer finite
    """

    failed: bool = False
    message: str = ""


@dataclass(frozen=True)
class Place:
    """Where a worker computes: CPU cores of this machine, or a share of one GPU."""

    cores: tuple[int, ...] = ()
    gpu: str | None = None
    share: float = 1.0

    def take(self) -> None:
        """Bind this process to the place, before JAX looks for devices."""
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
            if self.share < 1:
                os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # both are refused
                os.environ["XLA_CLIENT_MEM_FRACTION"] = f"{0.9 * self.share:.2f}"
        elif self.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)


def places(workers: int | None = None) -> list[Place]:
    """A place for each of `workers`; by default one per GPU, else one per CPU core.

    GPUs are shared when there are more workers. A TPU belongs to one process: one worker has it.
    Raises ConfigError.
    """
    if gpus := _gpus():
        workers = workers or len(gpus)
        each = -(-workers // len(gpus))
        return [Place(gpu=gpus[i % len(gpus)], share=1 / each) for i in range(workers)]
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = tuple(sorted(affinity(0))) if affinity else tuple(range(os.cpu_count() or 1))
    tpu = importlib.util.find_spec("libtpu") and glob.glob("/dev/accel*")
    most = 1 if tpu else len(cores)
    if (workers or 1) > most:
        raise ConfigError(f"--workers={workers}: here is room for {most}; give as many at most")
    return [Place(cores=cores[i :: workers or most]) for i in range(workers or most)]


def _gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, if JAX can."""
    able = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if not able or os.environ.get("JAX_PLATFORMS", "").lower() == "cpu":
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]


# ---- the parent's side ---------------------------------------------------------------------------


class Worker:
    """A process that answers one request at a time."""

    def __init__(self, place: Place, imports: Sequence[str]):
        self.place = place
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, place, tuple(imports)))
        self.process.start()
        theirs.close()
        self.run: Run | None = None

    def train(self, run: Run) -> None:
        self.run = run
        self.connection.send(("train", run.settings.to_dict()))

    def seconds_per_step(self, settings: Sequence[Settings]) -> list[float]:
        """Of each, measured in turns; see throughput.py. Raises TrainingError."""
        self.connection.send(("measure", [one.to_dict() for one in settings]))
        answer = self._answer()
        if isinstance(answer, Outcome):
            raise TrainingError(f"no throughput was measured: {answer.message}")
        return answer

    def outcome(self) -> Outcome:
        """Waits for the end of the run."""
        self.run = None
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            return Outcome(True, f"its process ended with exit code {code}; out of memory?")

    def close(self) -> None:
        """End the process; a run that it is at is saved."""
        with contextlib.suppress(OSError):  # it may be gone
            self.connection.send(None)
        if self.run:
            self.process.terminate()
        self.process.join()
        self.connection.close()


def train_all(
    runs: Sequence[Run],
    places: Sequence[Place],
    *,
    imports: Sequence[str] = (),
    watch: Callable[[list[Run]], None] = lambda running: None,
) -> Iterator[tuple[Run, Outcome]]:
    """Train `runs`, in their order as places become free; each with its outcome when it has one.

    `watch` is called every second or so with the runs that are being trained. After SIGINT or
    SIGTERM the running ones save and end, and no other begins.
    """
    waiting, workers = list(runs), [Worker(place, imports) for place in places[: len(runs)]]
    try:
        with _stopping(workers) as stopped:
            for worker in workers:
                worker.train(_next(waiting, workers, None))
            while busy := [worker for worker in workers if worker.run]:
                ready = multiprocessing.connection.wait([w.connection for w in busy], timeout=1)
                for worker in [w for w in busy if w.connection in ready]:
                    run, outcome = worker.run, worker.outcome()
                    assert run
                    if waiting and not stopped:
                        if not worker.process.is_alive():
                            at = workers.index(worker)
                            workers[at] = worker = Worker(worker.place, imports)
                        worker.train(_next(waiting, workers, run))
                    yield run, Outcome() if stopped else outcome
                watch([worker.run for worker in workers if worker.run])
    finally:
        for worker in workers:
            worker.close()


def _next(waiting: list[Run], workers: Sequence[Worker], last: Run | None) -> Run:
    """Takes a run of the same row as `last`, else of a row that nobody trains, else the first."""
    taken = {worker.run.row.label for worker in workers if worker.run}
    found = next((run for run in waiting if last and run.row == last.row), None)
    found = found or next((run for run in waiting if run.row.label not in taken), waiting[0])
    waiting.remove(found)
    return found


@contextlib.contextmanager
def _stopping(workers: list[Worker]) -> Iterator[list[int]]:
    """Signals to this process reach `workers`; the list that it gives then has the signal."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        for worker in workers:
            if worker.run and worker.process.is_alive():
                worker.process.terminate()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the worker's side ---------------------------------------------------------------------------


def _serve(
    connection: multiprocessing.connection.Connection, place: Place, imports: Sequence[str]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent passes on what it receives
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place.take()
    train = importlib.import_module(cli.PROGRAMS["train"].module).train
    logging.set_verbosity(logging.ERROR)
    flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags
    keep_compiled()
    cli.import_own(imports)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while (request := connection.recv()) is not None:
            kind, values = request
            if kind == "train":
                connection.send(_train(train, Settings.from_dict(values)))
            else:
                connection.send(_measure(values))


def _end_with_parent() -> None:
    """Save and end when the parent is gone: the same sweep may be started again at any time."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _train(train: Callable[..., Path], settings: Settings) -> Outcome:
    assert settings.train.run_dir
    folder = Path(settings.train.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run_lock.wait_until_free(folder, seconds=ENDING)  # a worker of a killed sweep may still save
    with _output_to(folder / CONSOLE):
        return _tried(lambda: (train(settings, command="the same sweep"), Outcome())[1])


def _measure(values: Sequence[Mapping[str, Any]]) -> list[float] | Outcome:
    return _tried(lambda: throughput.seconds_per_step([Settings.from_dict(one) for one in values]))


def _tried(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except TrainingError as error:
        return Outcome(message=str(error))
    except UserError as error:
        return Outcome(True, str(error))
    except Exception as error:  # a defect of one run is no reason to lose the others
        traceback.print_exc()
        told = " ".join(str(error).split())
        return Outcome(True, f"{type(error).__name__}: {told[:200]}; its {CONSOLE} says where")


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """What Python and the libraries below it print goes to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)
