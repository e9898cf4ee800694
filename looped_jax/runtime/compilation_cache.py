"""Compiled programs that outlive the process, so that the second start is quick."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

from looped_jax.files import default_cache_dir

LARGEST = 4 << 30  # bytes of programs that are kept
_PROCESSOR = Path("/proc/cpuinfo")


def keep_compiled() -> None:
    """Keep compiled programs in the cache folder, unless $JAX_COMPILATION_CACHE_DIR says where.

    The key is the program, its flags and the versions of JAX and XLA: a stale one is never used.
    Kinds of processors have a folder each: code compiled for one may hold what another cannot run,
    and hosts may share a home. Over LARGEST bytes in all, those not used for longest go.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled = default_cache_dir() / "compiled"
        drop_oldest(compiled, LARGEST)
        jax.config.update("jax_compilation_cache_dir", str(compiled / processor()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def processor() -> str:
    """A name for processors with this one's instructions, as x86_64-1f0c22ab."""
    try:
        lines = _PROCESSOR.read_text("utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = [platform.processor()]
    instructions = [line for line in lines if line.startswith(("flags", "Features"))] or lines
    digest = hashlib.sha256(instructions[0].encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"


def drop_oldest(folder: Path, largest: int) -> None:
    """Remove the files in `folder` that were not used for longest, until `largest` bytes are left.

    Other processes may write, read and remove there meanwhile.
    """
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                state = path.stat()
                found.append((max(state.st_atime, state.st_mtime), state.st_size, path))
    left = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if left <= largest:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        left -= size
