"""Judge a checkpoint at many loop counts, all from one forward pass of the largest.

    looped-jax evaluate --checkpoint runs/FLT_K4_L2_END_D128 --loops 1,2,4,8

Modes of a text model: `bpb` bits per byte on training and validation text, `ppl` perplexity of
WikiText-2 and of LAMBADA's last words, `core` the 22 CORE tasks, `sample` greedy texts. Of a model
of any other task: `validation`, what its training was judged by.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import looped_jax
from looped_jax import cli, errors
from looped_jax.config.registry import TASKS
from looped_jax.data import fetch
from looped_jax.errors import ArgumentError
from looped_jax.evaluation.evaluator import Evaluator, Scores, table
from looped_jax.runtime import distributed, sharding
from looped_jax.runtime.compilation_cache import keep_compiled
from looped_jax.training.progress import Console


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(cli.parse("evaluate", argv))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The loop counts, and the scores at each of them by metric."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    keep_compiled()
    args.bundle_url = args.bundle_url or fetch.BUNDLE_URL
    with errors.printed():
        distributed.initialize()
        mesh = sharding.mesh_of(args.mesh, default="data=-1")
        model = looped_jax.load(args.checkpoint, step=args.step, mesh=mesh)
        evaluator = Evaluator(model, args, Console(quiet=jax.process_index() > 0))
        scores: Scores = {}
        for mode in chosen_modes(args.modes, model.config.data.task):
            scores |= getattr(evaluator, mode)()
            evaluator.write(scores)
    if scores:
        evaluator.log(table(scores, evaluator.loops))
    evaluator.log(f"results: {evaluator.out}")
    return {"loops": evaluator.loops, "scores": {k: np.array(v) for k, v in scores.items()}}


def chosen_modes(given: Sequence[str] | None, task: str) -> Sequence[str]:
    """The modes that are asked for, by default all of the task's. Raises ArgumentError."""
    modes = TASKS[task].modes
    if wrong := [mode for mode in given or () if mode not in modes]:
        raise ArgumentError(
            f"--modes={','.join(wrong)} is not for data.task={task}; choose from {', '.join(modes)}"
        )
    return given or modes


if __name__ == "__main__":
    main()
