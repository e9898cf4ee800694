"""Compile time, peak temporary memory and step time of the train step against the loop count.

    python -m benchmarks.loops --loops 1,2,4,8,12,24 --width 128

Compiles the real step for every K, with each choice of what the backward pass recomputes, then
takes steps of all of them in turn (so that a machine that slows down slows all) and prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import numpy as np

from looped_jax.config.settings import (
    MeshConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
)
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import optimizers, train_step


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--loops", default="1,2,4,8,12,24")
    flags.add_argument("--remat", default="loop,offload,dots,none")
    flags.add_argument("--layers", type=int, default=4)
    flags.add_argument("--width", type=int, default=256)
    flags.add_argument("--seq_len", type=int, default=256)
    flags.add_argument("--batch_size", type=int, default=4)
    flags.add_argument("--vocab_size", type=int, default=4096)
    flags.add_argument("--dtype", default="float32")
    flags.add_argument("--rounds", type=int, default=3)
    args = flags.parse_args()
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, jax {jax.__version__}; L={args.layers} D={args.width} "
        f"T={args.seq_len} B={args.batch_size} V={args.vocab_size} {args.dtype}"
    )
    counts = [int(k) for k in args.loops.split(",")]
    cases = [Case(args, k, remat) for remat in args.remat.split(",") for k in counts]
    for _ in range(args.rounds):
        for case in cases:
            case.take_step()
    looped = [case for case in cases if case.loops >= 2] or cases
    first = {case.remat: case for case in reversed(looped)}
    least = min(case.loops for case in looped)
    print(
        f"| backward keeps | K | compile s | against K={least} "
        "| temporary MiB | step ms | tokens/s |"
    )
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        fewest = first[case.remat]
        seconds = statistics.median(case.seconds)
        print(
            f"| {case.remat} | {case.loops} | {case.compile_seconds:.2f} | "
            f"{case.compile_seconds / fewest.compile_seconds:.2f} | {case.temporary / 2**20:.0f} | "
            f"{1e3 * seconds:.0f} | {args.batch_size * args.seq_len / seconds:,.0f} |"
        )


class Case:
    """One K and one choice of rematerialisation: compiled, and stepped on demand."""

    def __init__(self, args: argparse.Namespace, loops: int, remat: str):
        self.loops, self.remat, self.seconds = loops, remat, []
        config = resolve(
            Settings(
                model=ModelSettings(
                    layers=args.layers, loops=loops, width=args.width, seq_len=args.seq_len,
                    dtype=args.dtype, remat=remat,
                ),
                optim=OptimConfig(newton_schulz_dtype=args.dtype),
                train=TrainSettings(batch_size=args.batch_size),
            ),
            vocab_size=args.vocab_size,
        )  # fmt: skip
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        optimizer = optimizers.make_optimizer(config, steps=100)
        shape = (1, args.batch_size, args.seq_len + 1)
        self.tokens = np.random.default_rng(0).integers(0, args.vocab_size, shape, np.int32)
        self.state = train_step.create(config, optimizer, mesh)
        step = train_step.make_train_step(config, optimizer, mesh)
        lowered = step.lower(self.state, jax.ShapeDtypeStruct(shape, np.int32))
        start = time.perf_counter()
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporary = self.step.memory_analysis().temp_size_in_bytes
        self.take_step()
        self.seconds.clear()  # the first step is not timed
        print(f"compiled K={loops} {remat} in {self.compile_seconds:.2f} s", flush=True)

    def take_step(self) -> None:
        start = time.perf_counter()
        self.state, metrics = self.step(self.state, self.tokens)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - start)


if __name__ == "__main__":
    main()
