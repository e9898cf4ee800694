"""What it costs to score many loop counts: one pass for all against the largest alone, and each.

    python -m benchmarks.evaluation --loops 1,3,6,9,12

Scores the same rows with the same weights all three ways in turn, and prints medians and ratios.
`answers` scores spans of 8 tokens, as CORE does; `every token` scores all, as bits per byte does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from looped_jax.config.settings import MeshConfig, ModelSettings, Settings
from looped_jax.evaluation import scoring
from looped_jax.model import transformer
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--loops", default="1,3,6,9,12")
    flags.add_argument("--layers", type=int, default=3)
    flags.add_argument("--width", type=int, default=192)
    flags.add_argument("--seq_len", type=int, default=256)
    flags.add_argument("--batch_size", type=int, default=16)
    flags.add_argument("--vocab_size", type=int, default=4096)
    flags.add_argument("--dtype", default="float32")
    flags.add_argument("--rounds", type=int, default=5)
    args = flags.parse_args()
    loops = tuple(int(k) for k in args.loops.split(","))
    settings = ModelSettings(
        layers=args.layers, width=args.width, seq_len=args.seq_len, dtype=args.dtype
    )
    model = resolve(Settings(model=settings), vocab_size=args.vocab_size).model
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.jit(lambda: transformer.init_params(model, jax.random.key(0)))()
    shape = (args.batch_size, args.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, shape, np.int32)
    ends = np.full(args.batch_size, args.seq_len, np.int32)
    sizes = np.ones(args.vocab_size, np.int32)

    def answers(counts: tuple[int, ...]) -> Callable:
        step = scoring.make_span_step(model, mesh, counts, width=16)
        return lambda: step(params, tokens, ends - 8, ends)

    def every_token(counts: tuple[int, ...]) -> Callable:
        step = scoring.make_score_step(model, mesh, counts)
        return lambda: step(params, tokens[:, :-1], tokens[:, 1:], sizes)

    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; L={args.layers} D={args.width} "
        f"T={args.seq_len} B={args.batch_size} V={args.vocab_size} {args.dtype}; loops {loops}"
    )
    print("| scored | all ms | largest ms | each alone ms | all / largest | each alone / all |")
    print("|---|---|---|---|---|---|")
    for name, make in (("answers", answers), ("every token", every_token)):
        alone = [make((k,)) for k in loops]
        ways = [make(loops), *alone]
        seconds: list[list[float]] = [[] for _ in ways]
        for way in ways:
            jax.block_until_ready(way())
        for _ in range(args.rounds):
            for way, times in zip(ways, seconds, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(way())
                times.append(time.perf_counter() - start)
        together, *singles = (1e3 * statistics.median(times) for times in seconds)
        largest, each = singles[loops.index(max(loops))], sum(singles)
        print(
            f"| {name} | {together:.0f} | {largest:.0f} | {each:.0f} | {together / largest:.2f} | "
            f"{each / together:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
