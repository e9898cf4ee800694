"""One run at a time trains in a folder: a second start is refused, and told who is at it."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import jax

from looped_jax import files
from looped_jax.errors import CheckpointError
from looped_jax.runtime import agreement, distributed

NAME = ".lock"
# Seconds in which what one process has written is seen on its own host, and on others: gcsfuse and
# NFS (acdirmax) by default believe what they know of a file or folder for 60.
VISIBLE_AFTER, VISIBLE_ELSEWHERE_AFTER = 10.0, 75.0


class RunLock:
    """Held on <run_dir>/.lock from `with` to its end, by process 0 for all of the run.

    The others look there for what it wrote: the folder has to be on a disk that all share. The
    system lets go of the lock when process 0 dies, however it dies; the file stays. Where the file
    system has no locks, `warning` says that a second start would not be noticed. Readers of a run
    need no lock.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / NAME
        self.warning: str | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Raises UserError in all processes: another run has the folder, or it is not shared."""
        first = jax.process_index() == 0
        with agreement.together():
            if first:
                files.check_writable(self.path.parent)
                self._take()
        holder = distributed.gather_json(_read(self.path) if first else None)[0]
        with agreement.together():
            if not first:
                self._expect(holder)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()

    def _take(self) -> None:
        try:
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:  # another user's
            raise CheckpointError(
                f"{self.path} cannot be opened ({error.strerror}); make it writable, or give "
                "another train.run_dir"
            ) from error
        try:
            taken = files.lock(self._file, wait=False)
        except OSError as error:  # an NFS without a lock manager, Lustre without -o flock
            self.warning = (
                f"{self.path}: no locks on this file system ({os.strerror(error.errno or 0)}); "
                "nothing would stop a second start from training here too"
            )
            taken = True
        if not taken:
            self._file.close()
            self._file = None
            raise CheckpointError(
                f"train.run_dir={self.path.parent} is in use: {_words(_read(self.path))} trains "
                "there; wait for its end, stop it, or give another train.run_dir"
            )
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": now}, self._file)
        self._file.flush()
        os.fsync(self._file.fileno())  # so that other hosts see it

    def _expect(self, holder: dict[str, Any] | None) -> None:
        here = holder is not None and holder["host"] == socket.gethostname()
        seconds = VISIBLE_AFTER if here else VISIBLE_ELSEWHERE_AFTER
        deadline = time.monotonic() + seconds
        while _read(self.path) != holder:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"train.run_dir={self.path.parent} is not the folder that process 0 has: what "
                    f"it wrote into {NAME} is not seen; give a folder on a disk that all hosts "
                    "share"
                )
            time.sleep(0.1)


def wait_until_free(run_dir: str | Path, *, seconds: float) -> None:
    """Wait until nobody trains in a folder; no longer than so many seconds."""
    path, deadline = Path(run_dir) / NAME, time.monotonic() + seconds
    while path.is_file() and time.monotonic() < deadline:
        try:
            with path.open("a+", encoding="utf-8") as file:
                if files.lock(file, wait=False):
                    return
        except OSError:  # no locks here, or not ours: the run itself says so
            return
        time.sleep(0.2)


def _read(path: Path) -> dict[str, Any] | None:
    """What the holder of a lock wrote of itself; None where there is nothing whole."""
    try:
        found = json.loads(path.read_text("utf-8"))
        return found if {"host", "pid", "since"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _words(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
