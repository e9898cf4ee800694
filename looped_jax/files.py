"""Files and folders that appear whole or not at all, whenever the program is killed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from looped_jax.errors import CheckpointError, ConfigError

_UMASK = threading.Lock()
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # C:/ is a drive


def check_on_disk(path: str | os.PathLike[str], given_as: str) -> None:
    """Raise ConfigError for an address, as gs://bucket/run, where a file or folder is wanted.

    As a path it would be a local folder `gs:`, lost with the machine.
    """
    if _ADDRESS.match(os.fspath(path)):
        raise ConfigError(
            f"{given_as}={path} is an address; files are read and written on disks alone: mount "
            "the bucket (gcsfuse), or use a disk that all hosts share, and give the folder there"
        )


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 under a temporary name beside `path`, then rename it."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write `value` as `to_json` gives it, with a newline at the end."""
    write_text(path, to_json(value, **options) + "\n")


def to_json(value: Any, **options: Any) -> str:
    """As json.dumps, but with null for every number that is not finite: JSON has no word for it."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_null_for_nan(value), allow_nan=False, **options)


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name beside `path`, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _let_others_in(Path(part), 0o666)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well.

    When another process was faster, its folder stays and this one is dropped: both wrote the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    _let_others_in(part, 0o777)
    try:
        yield part
        try:
            part.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _let_others_in(path: Path, mode: int) -> None:
    """As if made by open() or mkdir(); what tempfile makes is for its maker alone."""
    with _UMASK:  # it can be read only by setting it, and is the process's
        mask = os.umask(0)
        os.umask(mask)
    path.chmod(mode & ~mask)


def lock(file: IO, *, wait: bool = True) -> bool:
    """Lock the open file for this process alone; closing it, or dying, lets go.

    While another process has it, wait, or without `wait` return False. Raises OSError where the
    file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(file, wait)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def only_one(path: Path, *, needed: bool = True) -> Iterator[None]:
    """One process at a time makes `path`; the system lets go of the lock when a process dies.

    Raises OSError where the file system has no locks; where that is not `needed`, because each
    makes the same and it appears whole, all go on at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = path.with_name(path.name + ".lock")
    while True:
        with held.open("w") as file:
            try:
                lock(file)
            except OSError:
                if needed:
                    raise
            if not _is_at(file, held):
                continue  # whoever held it has removed it: others may hold a new one by now
            try:
                yield
            finally:
                with contextlib.suppress(PermissionError):  # Windows removes no open file
                    held.unlink(missing_ok=True)
            return


def _is_at(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock_on_windows(file: IO, wait: bool) -> bool:
    import msvcrt

    file.seek(1 << 30)  # a byte behind all others: what is locked cannot be read there
    while True:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore
            return True
        except OSError:
            if not wait:
                return False
            time.sleep(0.1)


def check_writable(folder: Path, given_as: str = "train.run_dir") -> None:
    """Make the folder and write to it, or raise CheckpointError that names the setting or flag."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"looped_jax")
    except OSError as error:
        raise CheckpointError(
            f"{given_as}: {folder} cannot be written ({os.strerror(error.errno or 0)}); make it "
            "writable or give another"
        ) from error


def default_cache_dir() -> Path:
    """$LOOPED_JAX_CACHE, else $XDG_CACHE_HOME/looped_jax, else ~/.cache/looped_jax."""
    given = os.environ.get("LOOPED_JAX_CACHE")
    check_on_disk(given or "", "LOOPED_JAX_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "looped_jax"
