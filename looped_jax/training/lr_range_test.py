"""The learning rate range test: one multiplier on all rates, raised step by step until it breaks.

Source: Smith, "Cyclical learning rates for training neural networks", 2017.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.lib.stride_tricks import sliding_window_view

from looped_jax.config.resolved import Config, micro_batches
from looped_jax.config.settings import OptimConfig
from looped_jax.errors import CheckpointError, ConfigError
from looped_jax.model import attention_kernels
from looped_jax.runtime import hardware, sharding
from looped_jax.training import optimizers, train_step
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.metric_log import EMA
from looped_jax.training.row_draws import RowDraws
from looped_jax.training.train_state import TrainState

SMOOTHING = 0.9
DIVERGED = 1.5  # times the lowest smoothed loss so far: no use in going on


@dataclass(frozen=True)
class Ramp:
    """One sweep. multipliers, losses, smoothed: float64 [N], N steps until the end or divergence.

    steepest: multiplier where the smoothed loss falls fastest per factor of e
    elbow: multiplier beyond which a higher rate pays little: of the way from the steepest point to
    the lowest, the point farthest below the straight line
    lowest: multiplier of the lowest smoothed loss, the last that can be used at all
    """

    multipliers: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    steepest: float
    elbow: float
    lowest: float


def ramp(low: float, high: float, steps: int, *, start: int = 0) -> Callable:
    """Schedule from `low` at step `start` to `high` at step start + steps − 1, geometrically."""

    def multiplier(step):
        share = (step - start) / max(steps - 1, 1)
        return low * (high / low) ** share

    return multiplier


def sweep(
    config: Config,
    state: TrainState,
    batches: Iterator[Any],
    mesh: Mesh,
    *,
    low: float,
    high: float,
    steps: int,
    log: Callable[[str], None] = print,
) -> Ramp:
    """Train a copy of `state` for up to `steps` steps of `batches`; `state` stays as it is.

    Batches are [micro-batches, rows, ...], as training has them. Stops when the loss is no number
    or has grown to DIVERGED times its lowest.
    """
    schedule = ramp(low, high, steps, start=int(state.step))
    optimizer = optimizers.make_optimizer(config, mesh, steps=steps, multiplier=schedule)
    step = train_step.make_train_step(config, optimizer, mesh)
    copy = jax.tree.map(jnp.copy, state)  # the step gives its input's memory away
    smooth, losses, smoothed = EMA(smoothing=SMOOTHING), [], []
    batch_sharding = sharding.batch_sharding(mesh)
    for number, batch in zip(range(steps), batches, strict=False):
        arrays = jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(batch_sharding, rows), batch
        )
        copy, metrics = step(copy, arrays)
        value = float(metrics["loss"])
        if not math.isfinite(value):
            break
        losses.append(value)
        smoothed.append(smooth.update(value))
        if (number + 1) % max(1, steps // 5) == 0:
            rate = schedule(int(state.step) + number)
            log(f"{config.model.loops} loops: step {number + 1}/{steps}, ×{rate:.3g}, {value:.4f}")
        if smoothed[-1] > DIVERGED * min(smoothed):
            break
    multipliers = low * (high / low) ** (np.arange(len(losses)) / max(steps - 1, 1))
    return analyse(multipliers, np.array(losses), np.array(smoothed))


def analyse(multipliers: np.ndarray, losses: np.ndarray, smoothed: np.ndarray) -> Ramp:
    """The steepest point and the elbow of a sweep. Raises ConfigError when nothing was learned."""
    if len(losses) < 12 or smoothed.argmin() < 2:
        raise ConfigError(
            f"the loss only rose from ×{multipliers[0] if len(losses) else 0:.3g} on "
            f"({len(losses)} steps); give a smaller --low or more --steps"
        )
    reach = max(2, len(losses) // 20)  # neighbours on each side that a slope is taken over
    slope = np.array(
        [
            np.polyfit(np.log(multipliers[i - reach : i + reach + 1]), window, 1)[0]
            for i, window in enumerate(sliding_window_view(smoothed, 2 * reach + 1), start=reach)
        ]
    )
    lowest = int(smoothed.argmin())
    steepest = min(reach + int(slope[: max(1, lowest - reach + 1)].argmin()), lowest)
    x = np.linspace(0, 1, lowest + 1 - steepest)
    line = smoothed[steepest] + x * (smoothed[lowest] - smoothed[steepest])
    elbow = steepest + int((line - smoothed[steepest : lowest + 1]).argmax())
    places = (float(multipliers[i]) for i in (steepest, elbow, lowest))
    return Ramp(multipliers, losses, smoothed, *places)


def overrides(config: OptimConfig, multiplier: float, groups: Collection[str] = ()) -> str:
    """The command line that sets all rates to `multiplier` times the config's.

    `groups` are those of the model's weights.
    """
    rates = optimizers.learning_rates(config, groups).items()
    return " ".join(f"--config.{name}={rate * multiplier:.3g}" for name, rate in rates)


def find(
    config: Config,
    loops: tuple[int, ...],
    rows: Callable[[], Any],
    mesh: Mesh,
    *,
    low: float,
    high: float,
    steps: int,
    from_run: bool,
) -> dict[int, Ramp]:
    """Sweep every loop count on the same batches, from the same weights.

    `rows` opens the rows of training from their start, as Task.train_rows does. With `from_run` the
    weights are those of train.run_dir's newest checkpoint. Errors as train's.
    """
    print(attention_kernels.check(config.model, hardware.attention_support(mesh)))
    num_micro_batches = micro_batches(config, devices=sharding.batch_devices(mesh))
    optimizer = optimizers.make_optimizer(config, mesh, steps=steps)
    if from_run:
        with Checkpoints(config.train.run_dir, read_only=True) as checkpoints:
            if (newest := checkpoints.latest()) is None:
                raise CheckpointError(
                    f"train.run_dir={config.train.run_dir} holds no checkpoint yet; train first"
                )
            state = checkpoints.restore(newest, train_step.abstract(config, optimizer, mesh))
    else:
        state = train_step.create(config, optimizer, mesh)
    ramps = {}
    for k in loops:
        looped = dataclasses.replace(config, model=dataclasses.replace(config.model, loops=k))
        draws = RowDraws(looped)
        with contextlib.closing(rows()) as opened:
            joined = (draws.join(batch, n) for n, batch in enumerate(opened, start=1))
            batches = (
                jax.tree.map(lambda a: a.reshape(num_micro_batches, -1, *a.shape[1:]), batch)
                for batch in joined
            )
            ramps[k] = sweep(looped, state, batches, mesh, low=low, high=high, steps=steps)
    return ramps
