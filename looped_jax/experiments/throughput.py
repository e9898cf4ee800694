"""How long a step of each of several runs takes, measured in turns on one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from looped_jax.config.registry import TASKS
from looped_jax.config.resolved import Config, micro_batches
from looped_jax.config.settings import Settings
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import optimizers, recomputation, train_step
from looped_jax.training.row_draws import RowDraws

ROUNDS = 7  # of all runs in turn, so that whatever else the machine does falls on all of them
SECONDS = 0.5  # a turn, at least
GOLDEN = 0.618034  # multiples of it, modulo 1, fill the unit interval evenly


def seconds_per_step(
    settings: Sequence[Settings], *, rounds: int = ROUNDS, seconds: float = SECONDS
) -> list[float]:
    """Median over the rounds, for each of the runs; compiling and first steps are left out."""
    steppers = [_stepper(one) for one in settings]
    taken: list[list[float]] = [[] for _ in steppers]
    for _ in range(rounds):
        for stepper, of_run in zip(steppers, taken, strict=True):
            began, steps = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                stepper()
                steps += 1
            of_run.append((time.perf_counter() - began) / steps)
    return [statistics.median(of_run) for of_run in taken]


def _stepper(settings: Settings) -> Callable[[], None]:
    """Takes one step of a run on its first batch, and waits for it."""
    mesh = sharding.make_mesh(settings.mesh)
    task = TASKS[settings.data.task](settings)
    config = resolve(settings, vocab_size=task.vocab_size)
    count = micro_batches(config, devices=sharding.batch_devices(mesh))
    optimizer = optimizers.make_optimizer(config, mesh)
    rows = task.train_rows(config, batch_size=config.train.tokens_per_step // config.model.seq_len)
    first, draws = next(rows), RowDraws(config)
    rows.close()

    def batch_of(number: int) -> Any:
        return jax.tree.map(
            lambda rows: jax.device_put(
                rows.reshape(count, -1, *rows.shape[1:]), sharding.batch_sharding(mesh)
            ),
            draws.join(first, number),
        )

    state, batch, taken = train_step.create(config, optimizer, mesh), batch_of(1), 0

    def compiled(config: Config) -> recomputation.Programs:
        step = train_step.make_train_step(config, optimizer, mesh)
        return {False: step.lower(state, batch).compile()}

    program = recomputation.least(config, compiled).programs[False]

    def step() -> None:
        nonlocal state, batch, taken
        if draws.loops.on:  # loops as steps all over the run have them, evenly
            taken += 1
            batch = batch_of(1 + int(taken * GOLDEN % 1 * config.train.steps))
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)

    step()
    step()
    return step
