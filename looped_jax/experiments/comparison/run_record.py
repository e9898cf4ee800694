"""What a run folder holds: its settings, every step, its validations, and what `evaluate` found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from looped_jax.config.resolved import Config
from looped_jax.errors import ArgumentError, DataError
from looped_jax.evaluation.evaluator import read_scores
from looped_jax.model import flops
from looped_jax.training import summary
from looped_jax.training.metric_log import read_log, validations
from looped_jax.training.run_folder import read_config

Scores = Mapping[str, Mapping[int, float]]  # metric -> loop count -> value


@dataclass(frozen=True)
class RunRecord:
    """One run by what it wrote. S steps, K loops, N steps with diagnostics.

    steps [S], the first is 1; loss [S], nats; grad_norm [S] before clipping; stream_norms [S, K] of
    the residual stream after each loop; tokens_per_second [S]; seconds and flops [S] of training up
    to each step: NaN where an older version did not record them; loop_grad_norms [N, K] of the
    gradient that arrives in each loop. Of sampled loops K are those with gradients, and norms of
    loops that no row ran are NaN
    validations: step -> metric -> loop count -> value, in the order of steps; "core/mean" is CORE
    while training
    evaluations: likewise what `looped-jax evaluate` wrote of checkpoints
    summary: summary.json; None of a run that is not complete
    """

    name: str
    config: Config
    steps: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    stream_norms: np.ndarray
    tokens_per_second: np.ndarray
    seconds: np.ndarray
    flops: np.ndarray
    loop_grad_norms: np.ndarray
    validations: Mapping[int, Scores]
    evaluations: Mapping[int, Scores]
    summary: Mapping[str, Any] | None

    @property
    def residual_growth(self) -> np.ndarray:
        """Norm of the residual stream after the last loop over that after the first, [S]."""
        return self.stream_norms[:, -1] / self.stream_norms[:, 0]

    @property
    def stopped(self) -> int | None:
        """The step whose loss or gradient was not finite, where training stops; None if all are."""
        broken = ~(np.isfinite(self.loss) & np.isfinite(self.grad_norm))
        return int(self.steps[broken.argmax()]) if broken.any() else None

    @property
    def complete(self) -> bool:
        return self.stopped is None and int(self.steps[-1]) == self.config.train.steps

    def spent(self, budget: str) -> np.ndarray:
        """The "tokens", "flops" or "seconds" up to each step, [S]. Raises ArgumentError for others.

        FLOPs count every loop that was run; seconds are the run's own, without compiling, scoring
        and saving.
        """
        tokens = self.steps * self.config.train.tokens_per_step
        if budget == "tokens":
            return tokens
        if budget == "flops":
            as_fixed = tokens * flops.count(self.config.model).flops  # when none were sampled
            return np.where(np.isnan(self.flops), as_fixed, self.flops)
        if budget == "seconds":
            return self.seconds
        raise ArgumentError(f"equal {budget!r}: choose tokens, flops or seconds")


def read(run_dir: Path) -> RunRecord:
    """Open a run folder; no checkpoint is read. Raises CheckpointError or DataError."""
    config = read_config(run_dir)
    entries = read_log(run_dir)
    steps = [e for e in entries if "train/loss" in e]
    if not steps:
        raise DataError(f"{run_dir}/metrics.jsonl has 0 steps; train it first")
    blocks = [e["diagnostics/gradient_block"] for e in entries if "diagnostics/gradient_block" in e]

    def series(name: str) -> np.ndarray:
        return np.array([e.get(name, np.nan) for e in steps], float)

    return RunRecord(
        name=run_dir.name,
        config=config,
        steps=np.array([e["step"] for e in steps]),
        loss=series("train/loss"),
        grad_norm=series("train/grad_norm"),
        stream_norms=np.array([e["loop/residual_norm"] for e in steps], float),
        tokens_per_second=series("speed/tokens_per_second"),
        seconds=series("total/seconds"),
        flops=series("total/flops"),
        loop_grad_norms=np.array([np.linalg.norm(block, axis=-1) for block in blocks]),
        validations=validations(entries),
        evaluations=_evaluations(run_dir),
        summary=_summary(run_dir / summary.NAME),
    )


def _evaluations(run_dir: Path) -> dict[int, Scores]:
    found: dict[int, Scores] = {}
    for path in sorted(run_dir.glob("evaluation/step_*/scores.json")):
        loops, scores = read_scores(path)
        found[int(path.parent.name.removeprefix("step_"))] = {
            metric: {k: v for k, v in zip(loops, values, strict=True) if v is not None}
            for metric, values in scores.items()
        }
    return found


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); move it away") from error
