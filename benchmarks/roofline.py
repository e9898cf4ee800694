"""What a device can do at best, measured, and so the least that some work takes there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one step."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> Work:
        return Work(times * self.flops, times * self.bytes)


@dataclass(frozen=True)
class Roofline:
    """Measured rates of one device: FLOP/s of matrix products, bytes/s of a copy."""

    flops: float
    bandwidth: float

    def __str__(self) -> str:
        return (
            f"{self.flops / 1e9:,.0f} GFLOP/s in matrix products, copies at "
            f"{self.bandwidth / 1e9:,.1f} GB/s"
        )

    def bound(self, work: Work) -> float:
        """Seconds that `work` takes at least."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


def measure_roofline(dtype: str) -> Roofline:
    """The best of several square products in `dtype`, and of copies far larger than any cache."""
    best, on_cpu = 0.0, jax.default_backend() == "cpu"
    for size in (512, 1024, 2048) if on_cpu else (2048, 4096, 8192):
        x = jnp.ones((size, size), dtype)
        best = max(best, 2 * size**3 / _fastest(jax.jit(jnp.matmul), x, x))
    x = jnp.ones(2**26 if on_cpu else 2**29, jnp.float32)
    copy_rate = 2 * x.nbytes / _fastest(jax.jit(lambda x: x + 1), x)
    return Roofline(best, copy_rate)


def _fastest(function: Callable, *arguments: Any) -> float:
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
