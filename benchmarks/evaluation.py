"""What it costs to score many loop counts, and prompts of many lengths.

    python -m benchmarks.evaluation --loops 1,3,6,9,12
    python -m benchmarks.evaluation --prompts 64 --layers 2 --width 128 --seq_len 128 --loops 1,2,4

Loop counts: one pass for all against the largest alone, and each. Scores the same rows with the
same weights all three ways in turn, and prints medians and ratios. `answers` scores spans of 8
tokens, as CORE does; `every token` scores all, as bits per byte does.

Prompts: as many as are asked for, of lengths that are even on a logarithmic scale up to ten rows,
with answers of 8 tokens, filled up as evaluation does it, and to powers of two in whole batches, as
it did before. Both in turn, in processor time, since others may use the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from looped_jax.config.settings import MeshConfig, ModelSettings, Settings
from looped_jax.evaluation import scoring
from looped_jax.evaluation.scoring import SpanScorer, power_up
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
    flags.add_argument("--prompts", type=int, default=0)
    args = flags.parse_args()
    loops = tuple(int(k) for k in args.loops.split(","))
    settings = ModelSettings(
        layers=args.layers, width=args.width, seq_len=args.seq_len, dtype=args.dtype
    )
    model = resolve(Settings(model=settings), vocab_size=args.vocab_size).model
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.jit(lambda: transformer.init_params(model, jax.random.key(0)))()
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; L={args.layers} D={args.width} "
        f"T={args.seq_len} B={args.batch_size} V={args.vocab_size} {args.dtype}; loops {loops}"
    )
    if args.prompts:
        settings = {"loop_counts": loops, "batch_size": args.batch_size}
        fillings = SpanScorer, PowersOfTwo
        score_prompts(args, [each(model, params, mesh, **settings) for each in fillings])
        return
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


@dataclass(frozen=True)
class Prompt:
    """Tokens int32 [n]; the last 8 are the answer."""

    tokens: np.ndarray

    @property
    def start(self) -> int:
        return len(self.tokens) - 8

    @property
    def end(self) -> int:
        return len(self.tokens)


class PowersOfTwo(SpanScorer):
    """Rows filled up to 64, 128, 256, … tokens, and every batch to as many rows."""

    def _batches(self, rows: Sequence[scoring.Span]) -> Iterator[tuple[int, int, int, list[int]]]:
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            length = power_up(len(row.tokens) - 1, 64, 2)
            alike[length + 1, power_up(row.end - row.start, 16, 4)].append(index)
        size = self._batch_size * self._devices
        for (length, width), indices in sorted(alike.items()):
            for first in range(0, len(indices), size):
                yield length, width, size, indices[first : first + size]


def score_prompts(args: argparse.Namespace, scorers: Sequence[SpanScorer]) -> None:
    """Print what each scorer takes for the same prompts, and the first beside the others."""
    lengths = np.geomspace(16, scoring.LONGEST * args.seq_len, args.prompts).astype(int)
    random = np.random.default_rng(0)
    rows = [Prompt(random.integers(0, args.vocab_size, n, np.int32)) for n in lengths]
    seconds: list[list[float]] = [[] for _ in scorers]
    found = []
    for _ in range(args.rounds + 1):
        for scorer, times in zip(scorers, seconds, strict=True):
            start = time.process_time()
            nats, _ = scorer(rows)
            times.append(time.process_time() - start)
            found.append(nats)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-4)
    print(
        f"{args.prompts} prompts of {lengths[0]} to {lengths[-1]} tokens, {lengths.sum():,} in all"
    )
    print("| filled up | positions | shapes | first time s | again s | first / new | again / new |")
    print("|---|---|---|---|---|---|---|")
    for scorer, (first, *again) in zip(scorers, seconds, strict=True):
        batches = list(scorer._batches(rows))
        positions = sum((length - 1) * size for length, _, size, _ in batches)
        shapes = len({batch[:3] for batch in batches})
        ratios = sorted(b / a for a, b in zip(seconds[0][1:], again, strict=True))
        print(
            f"| {type(scorer).__name__} | {positions:,} | {shapes} | {first:.1f} | "
            f"{np.median(again):.2f} | {first / seconds[0][0]:.2f} | {np.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
