"""The learning rate range test: one multiplier on all rates, raised step by step until it breaks.

Source: Smith, "Cyclical learning rates for training neural networks", 2017.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.lib.stride_tricks import sliding_window_view

from looped_jax.config import Config, OptimConfig, micro_batches
from looped_jax.data import corpus, pipeline, tokenizer
from looped_jax.errors import CheckpointError, ConfigError
from looped_jax.files import default_cache_dir
from looped_jax.model import attention_kernels
from looped_jax.resolve import resolve
from looped_jax.runtime import hardware, sharding
from looped_jax.training import optim, train_step
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.metric_log import Smoothed
from looped_jax.training.train_step import State

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
    current: State,
    batches: Iterator[np.ndarray],
    mesh: Mesh,
    *,
    low: float,
    high: float,
    steps: int,
    say: Callable[[str], None] = print,
) -> Ramp:
    """Train a copy of `current` for up to `steps` steps of `batches`; `current` stays as it is.

    Batches are int32 [micro-batches, rows, T + 1]. Stops when the loss is no number or has grown to
    DIVERGED times its lowest.
    """
    assert config.model.width
    schedule = ramp(low, high, steps, start=int(current["step"]))
    optimizer = optim.make_optimizer(config, mesh, steps=steps, multiplier=schedule)
    step = train_step.make_train_step(config, optimizer, mesh)
    copy = jax.tree.map(jnp.copy, current)  # the step gives its input's memory away
    smooth, losses, smoothed = Smoothed(smoothing=SMOOTHING), [], []
    place = sharding.batch_sharding(mesh)
    for number, tokens in zip(range(steps), batches, strict=False):
        copy, metrics = step(copy, jax.make_array_from_process_local_data(place, tokens))
        value = float(metrics["loss"])
        if not math.isfinite(value):
            break
        losses.append(value)
        smoothed.append(smooth.update(value))
        if (number + 1) % max(1, steps // 5) == 0:
            rate = schedule(int(current["step"]) + number)
            say(f"{config.model.loops} loops: step {number + 1}/{steps}, ×{rate:.3g}, {value:.4f}")
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


def overrides(config: OptimConfig, multiplier: float) -> str:
    """The command line that sets all rates to `multiplier` times the config's."""
    rates = ("matrix_learning_rate", "embedding_learning_rate", "head_learning_rate")
    return " ".join(
        f"--config.optim.{name}={getattr(config, name) * multiplier:.3g}" for name in rates
    )


def find(
    config: Config, loops: tuple[int, ...], *, low: float, high: float, steps: int, from_run: bool
) -> dict[int, Ramp]:
    """Sweep every loop count on the run's own text, from the same weights. Errors as train's."""
    mesh = sharding.make_mesh(config.mesh)
    cache, data = default_cache_dir(), config.data
    texts = corpus.open_corpus(
        data.path, val_shard=data.val_shard, train_shards=data.train_shards, cache_dir=cache
    )
    words = tokenizer.load_tokenizer(
        data.tokenizer,
        corpus=texts,
        vocab_size=data.tokenizer_vocab_size,
        bos_token=data.bos_token,
        cache_dir=cache,
    )
    config = resolve(config, vocab_size=words.vocab_size)
    assert config.train.run_dir and config.model.width
    print(attention_kernels.check(config.model, hardware.attention_support(mesh)))
    accumulated = micro_batches(config, devices=sharding.batch_devices(mesh))
    batch_size = config.train.tokens_per_step // config.model.seq_len
    optimizer = optim.make_optimizer(config, mesh, steps=steps)
    if from_run:
        with Checkpoints(config.train.run_dir, read_only=True) as checkpoints:
            if (newest := checkpoints.latest()) is None:
                raise CheckpointError(
                    f"train.run_dir={config.train.run_dir} holds no checkpoint yet; train first"
                )
            current = checkpoints.restore(newest, train_step.abstract(config, optimizer, mesh))
    else:
        current = train_step.create(config, optimizer, mesh)
    ramps = {}
    for k in loops:
        looped = dataclasses.replace(config, model=dataclasses.replace(config.model, loops=k))
        rows = pipeline.train_rows(
            texts, words, seq_len=config.model.seq_len, batch_size=batch_size, workers=data.workers
        )
        with contextlib.closing(iter(rows)) as iterator:
            batches = (b.reshape(accumulated, -1, config.model.seq_len + 1) for b in iterator)
            ramps[k] = sweep(looped, current, batches, mesh, low=low, high=high, steps=steps)
    return ramps
