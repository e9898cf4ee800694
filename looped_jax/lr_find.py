"""Find the usable learning rate: one multiplier on all rates, raised step by step until it breaks.

    python -m looped_jax.lr_find --config configs/flt.py:tiny --loops 1,4,12

Each loop count starts from the same weights (those of train.run_dir's last checkpoint with
--from_run) and reads the same batches as training would. Nothing of the run is changed. The ramp
follows Smith, "Cyclical learning rates for training neural networks", 2017.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from numpy.lib.stride_tricks import sliding_window_view

from looped_jax import atomic, figures, hardware, optim, sharding, state
from looped_jax.checkpoint import CheckpointError, Checkpoints, check_writable
from looped_jax.command_line import define_config, parse_flags
from looped_jax.compilation import keep_compiled
from looped_jax.config import Config, ConfigError, OptimConfig, micro_batches, resolve
from looped_jax.data import DataError, corpus, pipeline, tokenizer
from looped_jax.metrics import Smoothed
from looped_jax.model import kernels
from looped_jax.state import State

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
    optimizer = optim.make_optimizer(
        config.optim, steps=steps, width=config.model.width, mesh=mesh, multiplier=schedule
    )
    step = state.make_train_step(config, optimizer, mesh)
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
    cache, data = corpus.default_cache_dir(), config.data
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
    print(kernels.check(config.model, hardware.attention_support(mesh)))
    accumulated = micro_batches(config, devices=sharding.batch_devices(mesh))
    batch_size = config.train.tokens_per_step // config.model.seq_len
    optimizer = optim.make_optimizer(config.optim, steps=steps, width=config.model.width, mesh=mesh)
    if from_run:
        with Checkpoints(config.train.run_dir, read_only=True) as checkpoints:
            if (newest := checkpoints.latest()) is None:
                raise CheckpointError(
                    f"train.run_dir={config.train.run_dir} holds no checkpoint yet; train first"
                )
            current = checkpoints.restore(newest, state.abstract(config, optimizer, mesh))
    else:
        current = state.create(config, optimizer, mesh)
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


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    values = flags.FLAGS
    try:
        if not 0 < values.low < values.high or values.steps < 16:
            raise ConfigError(
                f"--low={values.low}, --high={values.high}, --steps={values.steps} make no ramp; "
                "give 0 < low < high and at least 16 steps"
            )
        config = Config.from_dict(values.config)
        loops = tuple(int(k) for k in values.loops or (config.model.loops,))
        if min(loops) < 1:
            raise ConfigError(f"--loops={values.loops} must be whole numbers from 1; as 1,4,12")
        out = Path(values.out)
        check_writable(out)
        keep_compiled()
        ramps = find(
            config,
            loops,
            low=values.low,
            high=values.high,
            steps=values.steps,
            from_run=values.from_run,
        )
    except (ConfigError, DataError, CheckpointError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    record = {
        k: {name: np.asarray(v).tolist() for name, v in dataclasses.asdict(found).items()}
        for k, found in ramps.items()
    }
    atomic.write_text(out / "lr_find.json", json.dumps(record))
    figures.learning_rate_ramps(ramps, path=out / "lr_find")
    for k, found in ramps.items():
        points = f"steepest at ×{found.steepest:.3g}, elbow at ×{found.elbow:.3g}, lowest at "
        print(
            f"{k} loops: {points}×{found.lowest:.3g} of the config's rates; for the elbow:\n"
            f"  --config.model.loops={k} {overrides(config.optim, found.elbow)}"
        )
    print(f"written: {out}/lr_find.json, .png and .svg")


if __name__ == "__main__":
    define_config()
    flags.DEFINE_list("loops", None, "loop counts to compare, as 1,4,12; the config's by default")
    flags.DEFINE_float("low", 1e-3, "first multiplier of all learning rates")
    flags.DEFINE_float("high", 30.0, "last multiplier")
    flags.DEFINE_integer("steps", 100, "optimizer steps of each ramp")
    flags.DEFINE_bool("from_run", False, "start from train.run_dir's newest checkpoint")
    flags.DEFINE_string("out", "runs/lr_find", "folder for the figure and the numbers")
    app.run(main, flags_parser=parse_flags)
