"""What sampled loop counts and truncated backpropagation cost, beside a fixed count.

    python -m benchmarks.sampled_loops --rounds 5

Takes real train steps of the tiny preset, the cases in turn (so that a machine that slows down
slows all), every round with other draws, and prints the processor time of each case beside that of
the fixed count, and what its FLOPs say.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import numpy as np

from looped_jax.config import presets
from looped_jax.config.settings import MeshConfig, Settings
from looped_jax.model.loop_costs import step_flops
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import optimizers, train_step
from looped_jax.training.row_draws import RowDraws

CASES = {
    "fixed": {},
    "fixed, k=2": {"backward_loops": 2},
    "Poisson": {"distribution": "poisson"},
    "Poisson, k=2": {"distribution": "poisson", "backward_loops": 2},
    "Poisson per sequence, k=2": {
        "distribution": "truncated_poisson", "per": "sequence", "backward_loops": 2,
    },
    "linear": {"curriculum": "linear"},
}  # fmt: skip
VOCAB = 4096


class Case:
    """One way to choose loops: compiled, and stepped on demand."""

    def __init__(self, sampling: dict, rows: int, steps: int):
        values = presets.make("FLT", "tiny")
        values.train.loop_sampling.update(sampling)
        values.train.steps, values.train.batch_size = steps, rows
        values.train.tokens_per_step = rows * values.model.seq_len
        self.config = config = resolve(Settings.from_dict(values), vocab_size=VOCAB)
        shape = (rows, config.model.seq_len + 1)
        self.rows = np.random.default_rng(0).integers(0, VOCAB, shape, np.int32)
        self.draws, mesh = (
            RowDraws(config),
            sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
        )
        optimizer = optimizers.make_optimizer(config, mesh)
        self.state = train_step.create(config, optimizer, mesh)
        self.step = train_step.make_train_step(config, optimizer, mesh)
        self.seconds: list[float] = []
        self.loops: list[tuple[float, float]] = []  # spent, and with gradients
        self.take(1)  # compiles
        self.seconds.clear()
        self.loops.clear()

    def take(self, number: int) -> None:
        """The step of that number."""
        batch = jax.tree.map(lambda a: a[None], self.draws.join(self.rows, number))
        start = time.process_time()
        self.state, metrics = jax.block_until_ready(self.step(self.state, batch))
        self.seconds.append(time.process_time() - start)
        k = self.config.model.loops
        found = metrics.get("loops", {"spent": k, "backward": k})
        self.loops.append((float(found["spent"]), float(found["backward"])))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--steps", type=int, default=6, help="of each case in a round")
    flags.add_argument("--rows", type=int, default=16)
    args = flags.parse_args()
    cases = {
        name: Case(sampling, args.rows, args.rounds * args.steps)
        for name, sampling in CASES.items()
    }
    model = cases["fixed"].config.model
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {model.variant} L={model.layers} "
        f"D={model.width} K={model.loops} T={model.seq_len} B={args.rows} {model.dtype}"
    )
    for n in range(args.rounds):
        for case in cases.values():
            for step in range(args.steps):
                case.take(1 + n * args.steps + step)
        print(f"round {n + 1}/{args.rounds}", flush=True)

    def by_round(case: Case) -> np.ndarray:
        return np.array(case.seconds).reshape(args.rounds, -1).sum(1)

    fixed = cases["fixed"]
    print("| loops | run | with gradients | FLOPs / fixed | time / fixed | rounds |")
    print("|---|---|---|---|---|---|")
    for name, case in cases.items():
        spent, backward = np.mean(case.loops, axis=0)
        flops = [step_flops(c.config.model, *np.mean(c.loops, axis=0)) for c in (case, fixed)]
        ratios = by_round(case) / by_round(fixed)
        print(
            f"| {name} | {spent:.2f} | {backward:.2f} | {flops[0] / flops[1]:.2f} | "
            f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
