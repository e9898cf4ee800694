"""Find the usable learning rate: one multiplier on all rates, raised step by step until it breaks.

    python -m looped_jax.lr_find --config configs/flt.py:tiny --loops 1,4,12

Each loop count starts from the same weights (those of train.run_dir's last checkpoint with
--from_run) and reads the same batches as training would. Nothing of the run is changed. The ramp
follows Smith, "Cyclical learning rates for training neural networks", 2017.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from looped_jax import errors, files
from looped_jax.cli import define_config, parse_flags
from looped_jax.config.registry import TASKS
from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError
from looped_jax.files import check_writable
from looped_jax.plotting import figures
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.runtime.compilation_cache import keep_compiled
from looped_jax.tasks.task import Task
from looped_jax.training.lr_range_test import find, overrides


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    values = flags.FLAGS
    with errors.printed():
        if not 0 < values.low < values.high or values.steps < 16:
            raise ConfigError(
                f"--low={values.low}, --high={values.high}, --steps={values.steps} make no ramp; "
                "give 0 < low < high and at least 16 steps"
            )
        settings = Settings.from_dict(values.config)
        loops = tuple(int(k) for k in values.loops or (settings.model.loops,))
        if min(loops) < 1:
            raise ConfigError(f"--loops={values.loops} must be whole numbers from 1; as 1,4,12")
        out = Path(values.out)
        check_writable(out)
        keep_compiled()
        mesh = sharding.make_mesh(settings.mesh)
        task: Task = TASKS[settings.data.task](settings)
        config = resolve(settings, vocab_size=task.vocab_size)
        batch_size = config.train.tokens_per_step // config.model.seq_len
        ramps = find(
            config,
            loops,
            lambda: task.train_rows(config, batch_size=batch_size),
            mesh,
            low=values.low,
            high=values.high,
            steps=values.steps,
            from_run=values.from_run,
        )
    record = {
        k: {name: np.asarray(v).tolist() for name, v in dataclasses.asdict(found).items()}
        for k, found in ramps.items()
    }
    files.write_text(out / "lr_find.json", json.dumps(record))
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
