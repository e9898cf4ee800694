"""Find the usable learning rates: a multiplier on all of them is raised until training breaks.

    looped-jax lr-find --config flt:tiny --loops 1,4,12

Each loop count starts from the same weights (those of train.run_dir's last checkpoint with
--from_run) and reads the same batches as training would. Nothing of the run is changed. The ramp
follows Smith, "Cyclical learning rates for training neural networks", 2017.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np
from absl import logging

from looped_jax import cli, errors, files
from looped_jax.config.registry import TASKS
from looped_jax.files import check_writable
from looped_jax.model import transformer
from looped_jax.plotting import figure_files, figures
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.runtime.compilation_cache import keep_compiled
from looped_jax.tasks.task import Task
from looped_jax.training.lr_range_test import find, overrides


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("lr-find", argv))


def run(args: argparse.Namespace) -> None:
    logging.set_verbosity(logging.ERROR)
    if not 0 < args.low < args.high:
        cli.stop(f"--low={args.low} and --high={args.high} make no ramp; give 0 < low < high")
    settings, out = args.settings, args.out
    with errors.printed():
        check_writable(out, "--out")
        keep_compiled()
        mesh = sharding.make_mesh(settings.mesh)
        task: Task = TASKS[settings.data.task](settings)
        config = resolve(settings, vocab_size=task.vocab_size)
        batch_size = config.train.tokens_per_step // config.model.seq_len
        ramps = find(
            config,
            args.loops or (settings.model.loops,),
            lambda: task.train_rows(config, batch_size=batch_size),
            mesh,
            low=args.low,
            high=args.high,
            steps=args.steps,
            from_run=args.from_run,
        )
    record = {
        k: {name: np.asarray(v).tolist() for name, v in dataclasses.asdict(found).items()}
        for k, found in ramps.items()
    }
    files.write_json(out / "lr_find.json", record)
    figure_files.save(figures.learning_rate_ramps(ramps), out / "lr_find")
    groups = {weight.group for weight in transformer.weights(config.model).values()}
    for k, found in ramps.items():
        points = f"steepest at ×{found.steepest:.3g}, elbow at ×{found.elbow:.3g}, lowest at "
        print(
            f"{k} loops: {points}×{found.lowest:.3g} of the config's rates; for the elbow:\n"
            f"  --config.model.loops={k} {overrides(config.optim, found.elbow, groups)}"
        )
    print(f"written: {out}/lr_find.json, .png, .svg, .pdf and .csv")


if __name__ == "__main__":
    main()
