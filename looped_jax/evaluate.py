"""Judge a checkpoint at many loop counts, all from one forward pass of the largest.

    looped-jax evaluate --checkpoint runs/FLT_K4_L2_END_D128 --loops 1,2,4,8

Modes of a text model: `bpb` bits per byte on training and validation text, `sample` greedy texts,
`core` the 22 CORE tasks, `ppl` perplexity of LAMBADA's last words and of WikiText-2. Of a model of
any other task: `validation`, what its training was judged by.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import looped_jax
from looped_jax import cli, errors
from looped_jax.config.registry import TASKS
from looped_jax.data import fetch
from looped_jax.errors import ArgumentError, CheckpointError
from looped_jax.evaluation.evaluator import Evaluator, Scores, table
from looped_jax.evaluation.score_history import NAME, ScoreHistory
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.runtime import distributed, sharding
from looped_jax.runtime.compilation_cache import keep_compiled
from looped_jax.training.checkpoint import saved_steps
from looped_jax.training.progress import Console


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(cli.parse("evaluate", argv))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The loop counts, and the scores at each of them by metric; of --all_steps, by step first."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    keep_compiled()
    args.bundle_url = args.bundle_url or fetch.BUNDLE_URL
    with errors.printed(), distributed.joined():
        mesh = sharding.mesh_of(args.mesh, default="data=-1")
        log = Console(quiet=jax.process_index() > 0)
        if args.all_steps:
            return _every_step(args, mesh, log)
        evaluator, scores = _one_step(args, mesh, log)
    return {"loops": evaluator.loops, "scores": {k: np.array(v) for k, v in scores.items()}}


def _one_step(args: argparse.Namespace, mesh: Mesh, log: Console) -> tuple[Evaluator, Scores]:
    model = looped_jax.load(args.checkpoint, step=args.step, mesh=mesh)
    evaluator = Evaluator(model, args, log)
    scores: Scores = {}
    for mode in chosen_modes(args.modes or possible_modes(model, log), model.config.data.task):
        scores |= getattr(evaluator, mode)()
        evaluator.write(scores)
    if scores:
        log(table(scores, evaluator.loops))
    log(f"results: {evaluator.out}")
    return evaluator, scores


def _every_step(args: argparse.Namespace, mesh: Mesh, log: Console) -> dict[str, Any]:
    """Scores of every checkpoint kept, each in a folder of its own, and their curve beside them."""
    steps = saved_steps(args.checkpoint)
    if args.step is not None:
        raise ArgumentError(f"--step={args.step} is one checkpoint; leave it or --all_steps out")
    if not steps:
        raise CheckpointError(f"{args.checkpoint} holds no checkpoint; give the folder of a run")
    folder, history = Path(args.out or Path(args.checkpoint) / "evaluation"), None
    for number, step in enumerate(steps, 1):
        log(f"step {step} ({number} of {len(steps)})")
        of_step = {"step": step, "out": str(folder / f"step_{step:06d}")}
        evaluator, scores = _one_step(argparse.Namespace(**vars(args) | of_step), mesh, log)
        history = history or ScoreHistory(
            evaluator.loops, trained=evaluator.model.config.model.loops
        )
        history.add(step, scores)
        if history.scores and evaluator.first:
            history.draw(folder)
    assert history
    log(f"{history}\nall steps: {folder}/{NAME}.png")
    found = {
        metric: np.array([of[step] for step in sorted(of)]) for metric, of in history.scores.items()
    }
    return {"loops": evaluator.loops, "steps": steps, "scores": found}


def possible_modes(model: TrainedModel, log: Console) -> Sequence[str]:
    """All modes of the model's task that its tokenizer, or none, leaves; the others are told."""
    modes = TASKS[model.config.data.task].modes
    if model.config.data.task != "text" or (model.has_text and model.tokenizer.start):
        return modes
    if not model.has_text:
        log("no tokenizer, so no text: nats per token alone")
        return ("bpb",)
    log("core and ppl left out: their prompts begin with a start token, which this tokenizer lacks")
    return ("bpb", "sample")


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
