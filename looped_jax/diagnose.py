"""Diagnose a checkpoint: one page on what each loop does, with figures.

    looped-jax diagnose --checkpoint runs/FLT_K4_L2_END_D128

Measures validation tokens at every loop count in one pass; draws attention and the residual stream
on a text, statistics of the weights, and the run's own log. Writes index.html, which needs no other
file; every figure as PNG, SVG and PDF, its numbers as CSV; measurements.json; and two folders of
pictures, attention_heatmaps and weight_distributions.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import looped_jax
from looped_jax import cli, errors, files
from looped_jax.config.registry import TASKS
from looped_jax.diagnostics import picture_folders, weight_statistics
from looped_jax.diagnostics.measure import TokenMeasurements, measure
from looped_jax.diagnostics.sections import make_sections, numbers, summary
from looped_jax.files import check_writable
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.model import attention_kernels
from looped_jax.plotting import html_report
from looped_jax.runtime import sharding
from looped_jax.runtime.compilation_cache import keep_compiled
from looped_jax.training.metric_log import read_log

TRACED = 48  # tokens of the text whose attention is drawn, at most


def diagnose(model: TrainedModel, args: argparse.Namespace) -> Path:
    """Measure, draw and write; the page's path. Raises DataError or CheckpointError."""
    config, out, task = model.config, Path(args.out), TASKS[model.config.data.task]
    loops = args.loops or max(config.model.loops, *config.train.eval_loops)
    tokens = measure(
        config.model,
        model.params,
        task.validation_batches(
            model, loops=loops, batch_size=args.batch_size, most=args.tokens, data=args.data
        ),
        loops=loops,
        mesh=model.mesh,
        progress=lambda done, total: log(f"validation: batch {done} of {total}", done == total),
    )
    ids = traced_tokens(model, tokens, args.text)
    log(f"attention and the residual stream on {len(ids)} tokens ...")
    record = ("block", "weights")
    trace = jax.device_get(model.run(ids[None], loops=(loops,), record=record).seen)
    log("weights ...")
    matrices = weight_statistics.compute(model.params)
    entries = read_log(Path(args.checkpoint))
    decode = functools.partial(task.decode, model)
    sections = make_sections(model, tokens, trace, ids, matrices, entries, decode)
    files.write_json(out / "measurements.json", numbers(tokens, trace, matrices), indent=1)
    attention = np.asarray(trace["weights"])[:, :, 0]
    words = [decode([i]) or "·" for i in ids.tolist()]
    log(picture_folders.write_attention(out, attention, words, most=args.pictures))
    log(picture_folders.write_weights(out, matrices, most=args.pictures))
    m = config.model
    about = (
        f"{m.variant}, {m.layers} layers looped {m.loops} times in training, width {m.width}, step "
        f"{model.step}; measured on {int(tokens.counted.sum()):,} validation tokens at up "
        f"to {loops} loops."
    )
    title = f"What the loops do: {Path(args.checkpoint).resolve().name}"
    return html_report.write(out, title, about, summary(model, tokens), sections)


def traced_tokens(model: TrainedModel, tokens: TokenMeasurements, text: str | None) -> np.ndarray:
    """Ids of the given text, or of the beginning of the first row, TRACED at most."""
    if text is None:
        return tokens.inputs[0, :TRACED]
    return np.array(model.tokenizer.prompt(text)[:TRACED], np.int32)


def log(line: str, last: bool = True) -> None:
    print(line, end="\n" if last or not sys.stdout.isatty() else "\r", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("diagnose", argv))


def run(args: argparse.Namespace) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)
    keep_compiled()
    with errors.printed():
        mesh = sharding.mesh_of(args.mesh)
        model = looped_jax.load(args.checkpoint, step=args.step, mesh=mesh)
        if line := attention_kernels.fall_back(model.config.model, model.mesh):
            log(line)
        args.out = args.out or Path(args.checkpoint) / "diagnosis" / f"step_{model.step:06d}"
        check_writable(Path(args.out), "--out")
        path = diagnose(model, args)
    print(f"open {path}")


if __name__ == "__main__":
    main()
