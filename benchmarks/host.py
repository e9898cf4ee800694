"""Python's overhead per training step: the whole program against its compiled step alone.

    python -m benchmarks.host --steps 400

The model is so small that the device is never what is waited for. The same step with the same
batches runs bare, and inside looped_jax.train with data, metrics, TensorBoard and console; medians
of seconds per step, the two in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags as absl_flags

from looped_jax.config.resolved import Config
from looped_jax.config.settings import DataConfig, ModelSettings, Settings, TrainSettings
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.train import train
from looped_jax.training import optimizers, train_step
from looped_jax.training.metric_log import read_log


def config_of(steps: int, run_dir: str) -> Config:
    return Settings(
        model=ModelSettings(layers=1, loops=2, width=16, heads=1, seq_len=16, dtype="float32"),
        data=DataConfig(tokenizer_vocab_size=512),
        train=TrainSettings(
            run_dir=run_dir, steps=steps, tokens_per_step=64, batch_size=4, eval_every=0,
            eval_tokens=64, save_every=0, sample_tokens=0, log_every=10,
        ),
    )  # fmt: skip


def whole(steps: int) -> float:
    """Median seconds per step of the program."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = str(Path(folder) / "run")
        with contextlib.redirect_stdout(io.StringIO()):
            train(config_of(steps, run_dir))
        tokens = 64
        rates = [e["speed/tokens_per_second"] for e in read_log(Path(run_dir)) if "train/loss" in e]
        return statistics.median(tokens / rate for rate in rates[20:])


def bare(steps: int) -> float:
    """Median seconds per step of the compiled step, its results waited for one step later."""
    config = resolve(config_of(steps, "unused"), vocab_size=512)
    mesh = sharding.make_mesh(dataclasses.replace(config.mesh, data=1), jax.devices()[:1])
    optimizer = optimizers.make_optimizer(config, mesh, steps=steps)
    current = train_step.create(config, optimizer, mesh)
    step = train_step.make_train_step(config, optimizer, mesh)
    tokens = np.random.default_rng(0).integers(0, 512, (1, 4, 17)).astype(np.int32)
    tokens = jax.device_put(tokens, sharding.batch_sharding(mesh))
    program = step.lower(current, tokens).compile()
    seconds, previous = [], None
    for _ in range(steps):
        start = time.perf_counter()
        current, metrics = program(current, tokens)
        if previous is not None:
            jax.block_until_ready(previous)
        previous = metrics
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[20:])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--steps", type=int, default=400)
    flags.add_argument("--rounds", type=int, default=3)
    args = flags.parse_args()
    absl_flags.FLAGS.mark_as_parsed()
    pairs = [(whole(args.steps), bare(args.steps)) for _ in range(args.rounds)]
    program, step = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    print("| | ms per step |\n|---|---|")
    print(f"| the program | {program:.2f} |\n| its compiled step alone | {step:.2f} |")
    print(f"| Python, data, metrics | {program - step:.2f} |")


if __name__ == "__main__":
    main()
