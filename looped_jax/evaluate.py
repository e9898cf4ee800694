"""Judge a checkpoint at many loop counts, all from one forward pass of the largest.

    python -m looped_jax.evaluate --checkpoint runs/FLT_K4_L2_END_D128 --loops 1,2,4,8

Modes: `bpb` bits per byte on training and validation text, `ppl` perplexity of WikiText-2 and of
LAMBADA's last words, `core` the 22 CORE tasks, `sample` greedy texts.
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
from looped_jax.data import fetch
from looped_jax.evaluation.evaluator import Evaluator, Scores, table
from looped_jax.runtime import distributed, sharding
from looped_jax.runtime.compilation_cache import keep_compiled
from looped_jax.training.progress import Console

MODES = ("bpb", "ppl", "core", "sample")


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(sorted({int(part) for part in text.split(",")}))
    if counts[0] < 1:
        raise ValueError
    return counts


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    if set(modes) - set(MODES):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(MODES)}")
    return modes


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    flags = argparse.ArgumentParser(prog="python -m looped_jax.evaluate", description=__doc__)
    flags.add_argument("--checkpoint", required=True, help="folder of a run")
    flags.add_argument("--step", type=int, help="checkpoint of this step; the newest by default")
    flags.add_argument("--modes", type=_modes, default=MODES, help="any of bpb,ppl,core,sample")
    flags.add_argument("--loops", type=_counts, help="loop counts, as 1,3,6; those of training")
    flags.add_argument("--data", help="text for bpb, a file or folder; the run's own by default")
    flags.add_argument("--eval_tokens", type=int, default=1_048_576, help="targets for bpb")
    flags.add_argument("--wikitext", help="WikiText-2 test split, text or parquet")
    flags.add_argument("--bundle", help="folder of the CORE bundle; downloaded by default")
    flags.add_argument("--bundle_url", default=fetch.BUNDLE_URL, help="where it is downloaded from")
    flags.add_argument("--max_per_task", type=int, help="examples per task; all by default")
    flags.add_argument("--batch_size", type=int, default=32, help="rows per device")
    flags.add_argument("--mesh", help="devices by axis, as data=4,tensor=2; all as data by default")
    flags.add_argument("--out", help="folder for results; inside the run by default")
    cli.add_import(flags)
    args = flags.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)
    keep_compiled()
    with errors.printed():
        cli.import_own(args.imports)
        distributed.initialize()
        mesh = sharding.mesh_of(args.mesh, default="data=-1")
        model = looped_jax.load(args.checkpoint, step=args.step, mesh=mesh)
        evaluator = Evaluator(model, args, Console(quiet=jax.process_index() > 0))
        scores: Scores = {}
        for mode in args.modes:
            scores |= getattr(evaluator, mode)()
            evaluator.write(scores)
    if scores:
        evaluator.log(table(scores, evaluator.loops))
    evaluator.log(f"results: {evaluator.out}")
    return {"loops": evaluator.loops, "scores": {k: np.array(v) for k, v in scores.items()}}


if __name__ == "__main__":
    main()
