"""What a run tells the person in front of it: one line at a time, with throughput and time left."""

from __future__ import annotations

import sys
import time

import jax

from looped_jax.training.metric_log import EMA


class Console:
    """Prints at once; silent in all processes but the first."""

    def __init__(self, *, quiet: bool):
        self.quiet = quiet

    def __call__(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


class Throughput:
    """Tokens per second between steps, and the time that is left."""

    def __init__(self, start: int, steps: int, tokens_per_step: int):
        self.steps, self.tokens, self.done = steps, tokens_per_step, start
        self.last = time.perf_counter()
        self.seconds = EMA()

    def tick(self, done: int) -> float:
        """Note that `done` steps are complete; tokens per second of the last one."""
        now = time.perf_counter()
        seconds, self.last, self.done = now - self.last, now, done
        self.seconds.update(seconds)
        return self.tokens / seconds

    def skip(self) -> None:
        """Leave out what happened since the last tick: it was no step."""
        self.last = time.perf_counter()

    def remaining(self) -> str:
        return duration(self.seconds.value * (self.steps - self.done))


def duration(seconds: float) -> str:
    """As hours:minutes:seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def memory_of(program: jax.stages.Compiled) -> str:
    """Compiled memory per device in words, so that running out of it is no riddle."""
    m = program.memory_analysis()
    if m is None:
        return "this backend does not tell its memory"
    parts = {
        "arguments": m.argument_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,
    }
    return ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in parts.items())


def memory_in_use() -> int:
    """Peak bytes of the first local device; of this process where devices do not tell (CPU).

    0 where neither does: Windows has no `resource`.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or _peak_of_process()


def _peak_of_process() -> int:
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
