"""The paper's claim at small size: every loop rule at several loop counts, on the same tokens.

    python -m benchmarks.claim                     # 2 cores, about half an hour
    python -m benchmarks.claim --preset larger     # 2 cores, about half an hour
    python -m benchmarks.claim --preset gpu        # the paper's width, one GPU

Claim (arXiv 2605.18797): with more loops plain looping (LT), and at K = 12 also LT_i and LT_ia, end
on a plateau of the loss, with a strongly varying gradient norm and a growing norm of the residual
stream; FLT trains on.

The runs are a grid (claim_grid.py), in runs/claim_<preset>: what was stopped goes on. All of them
are lines of <out>/runs.jsonl. benchmarks/claim.md has the results. A run is judged by the two signs
of looped_jax/experiments/comparison/verdict.py, never by the norm of the residual stream.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import claim_figures
from benchmarks.claim_grid import PRESETS, Setting
from looped_jax import errors, files
from looped_jax.config.registry import LOOP_RULES
from looped_jax.config.settings import OptimConfig
from looped_jax.errors import TrainingError
from looped_jax.experiments import workers
from looped_jax.experiments.comparison import run_record, verdict
from looped_jax.experiments.comparison.verdict import TAIL, Verdict
from looped_jax.experiments.experiment import Experiment
from looped_jax.experiments.grid import Grid, Run

NORMS_EVERY = 5  # steps between recorded norms of the residual stream


def sweep(setting: Setting, runs: Path, *, count: int | None = None) -> list[dict[str, Any]]:
    """Train what is missing in the folder `runs`, `count` at a time; a line for each run."""
    places = workers.places(count)
    experiment = Experiment.open(Grid.from_dict(setting.grid(), name="claim"), runs, places)
    failed = experiment.train(places, lambda line: print(line, flush=True))
    if failed:
        raise TrainingError("; ".join(f"{name}: {told}" for name, told in failed.items()))
    return [line(run) for run in experiment.runs]


def line(run: Run) -> dict[str, Any]:
    """A run in numbers, as runs.jsonl has it."""
    record, model, train = run_record.read(run.folder), run.config.model, run.config.train
    norms = record.stream_norms
    scores = list(record.validations.values())[-1:]
    rate = run.settings.optim.matrix_learning_rate / OptimConfig().matrix_learning_rate
    return {
        "rule": model.variant,
        "loops": model.loops,
        "seed": run.seed,
        "rate": rate,
        "steps": train.steps,
        "loss": _short(record.loss),
        "grad_norm": _short(record.grad_norm),
        "norms": [_short(row) for row in norms[NORMS_EVERY - 1 :: NORMS_EVERY]],
        "mean_norms": _short(norms.mean(axis=0)),
        "held_out": scores[0]["loss"][model.loops] if scores else float("nan"),
        "flops": run.flops,
        "seconds": round(float(record.seconds[-1]), 2),
    }


def _short(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(f"{float(value):.5g}") for value in values]


def key(line: dict[str, Any]) -> tuple:
    """What tells a run from the others."""
    return tuple(line[name] for name in ("rule", "loops", "seed", "rate", "steps"))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a runs.jsonl; none where there is none."""
    if not path.is_file():
        return []
    return [json.loads(text) for text in path.read_text("utf-8").splitlines()]


# ---- verdicts ------------------------------------------------------------------------------------


def judge(line: dict[str, Any], single: dict[str, Any]) -> Verdict:
    """The verdict on a run, against the run of one loop with the same seed and number of steps."""
    one_loop = single["loss"], single["grad_norm"]
    return verdict.judge(line["loss"], line["grad_norm"], one_loop)


def judge_all(lines: list[dict[str, Any]], setting: Setting) -> list[tuple[dict, Verdict]]:
    singles = {
        line["seed"]: line
        for line in lines
        if line["loops"] == 1 and line["steps"] == setting.steps
    }
    return [
        (line, judge(line, singles[line["seed"]] if line["steps"] == setting.steps else line))
        for line in lines
    ]


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.claim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--preset", choices=PRESETS, default="laptop")
    flags.add_argument("--out", type=Path, help="benchmarks/results/claim_<preset> by default")
    flags.add_argument("--data", help="folder of parquet shards; the builtin corpus by default")
    numbers = {"loops": int, "seeds": int, "rules": str}
    for name, kind in numbers.items():
        flags.add_argument(f"--{name}", help=f"{kind.__name__} values between commas")
    for name in ("steps", "layers", "width", "heads", "seq_len", "batch_size"):
        flags.add_argument(f"--{name}", type=int, help="another value than the preset's")
    flags.add_argument("--runs", type=Path, help="folder of the runs, runs/claim_<preset>")
    flags.add_argument("--workers", type=int, help="runs at a time; one per GPU or core")
    args = flags.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    out = given.pop("out", None) or Path("benchmarks/results") / f"claim_{args.preset}"
    runs = given.pop("runs", None) or Path("runs") / f"claim_{args.preset}"
    count = given.pop("workers", None)
    try:
        for name in numbers.keys() & given.keys():
            given[name] = tuple(numbers[name](value) for value in given[name].split(","))
    except ValueError as error:
        flags.error(f"--{name}={given[name]}: {error}")
    setting = dataclasses.replace(PRESETS[given.pop("preset")], **given)
    if unknown := set(setting.rules) - set(LOOP_RULES):
        flags.error(f"--rules: {', '.join(sorted(unknown))}: choose from {', '.join(LOOP_RULES)}")
    if min(setting.loops) < 1 or setting.steps < 2 * TAIL:
        flags.error(f"--loops start at 1, --steps at {2 * TAIL}")
    jax.config.update("jax_platforms", "cpu")  # the workers have the devices
    with errors.printed():
        lines = sweep(setting, runs, count=count)
    files.write_text(out / "runs.jsonl", "".join(files.to_json(line) + "\n" for line in lines))
    judged = judge_all(lines, setting)
    table = claim_figures.table(judged, reference=given.keys() <= {"loops", "rules", "seeds"}
                                and args.preset == "laptop")  # fmt: skip
    files.write_text(out / "table.md", table + "\n")
    print(table)
    torch = judge_all(read(out / "torch.jsonl"), setting)
    for name in claim_figures.draw(judged, setting, out, torch):
        print(f"open {out / name}")


if __name__ == "__main__":
    main()
