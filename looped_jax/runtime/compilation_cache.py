"""Compiled programs that outlive the process, so that the second start is quick."""

from __future__ import annotations

import os

import jax

from looped_jax.files import default_cache_dir


def keep_compiled() -> None:
    """Keep compiled programs in the cache folder, unless $JAX_COMPILATION_CACHE_DIR says where.

    The key is the program, its flags and the versions of JAX and XLA: a stale one is never used.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
