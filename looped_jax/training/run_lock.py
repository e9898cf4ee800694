"""One run at a time trains in a folder: a second start is refused, and told who is at it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import jax

from looped_jax import files
from looped_jax.errors import CheckpointError
from looped_jax.runtime import distributed

NAME = ".lock"


class RunLock:
    """Held on <run_dir>/.lock from `with` to its end, by process 0 for all of the run.

    The system lets go of it when that process dies, however it dies; the file stays. Where the file
    system has no locks, `warning` says that a second start would not be noticed. Readers of a run
    need no lock.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / NAME
        self.warning: str | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Raises CheckpointError in all processes when another run has the folder."""
        refused = None
        if jax.process_index() == 0:
            try:
                files.check_writable(self.path.parent)
                self._take()
            except CheckpointError as error:
                refused = str(error)
        if refused := distributed.gather_json(refused)[0]:
            raise CheckpointError(refused)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()

    def _take(self) -> None:
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            taken = files.lock(self._file, wait=False)
        except OSError as error:  # an NFS without a lock manager, Lustre without -o flock
            self.warning = (
                f"{self.path}: no locks on this file system ({os.strerror(error.errno or 0)}); "
                "nothing would stop a second start from training here too"
            )
            return
        if not taken:
            holder = self._holder()
            self._file.close()
            self._file = None
            raise CheckpointError(
                f"train.run_dir={self.path.parent} is in use: {holder} trains there; wait for its "
                "end, stop it, or give another train.run_dir"
            )
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": now}, self._file)
        self._file.flush()

    def _holder(self) -> str:
        """Who holds it, in words, as far as the file tells."""
        assert self._file is not None
        self._file.seek(0)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            of = json.load(self._file)
            return f"process {of['pid']} on {of['host']}, since {of['since']},"
        return "another process"
