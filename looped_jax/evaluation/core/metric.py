"""From losses to decisions, from decisions to accuracies, and from those to CORE."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from looped_jax.evaluation.core.bundle import Kind


@dataclass(frozen=True)
class TaskResult:
    """Which examples of a task were right at which loop count.

    correct: bool [n_examples, n_loops], in the order of the drawn task; baseline in percent;
    cropped: examples whose prompt lost its beginning, for longer than max_len; cut: those of which
    not even the scored span fitted.
    """

    name: str
    baseline: float
    correct: np.ndarray
    cropped: int = 0
    cut: int = 0

    @property
    def accuracy(self) -> np.ndarray:
        """Fraction of right answers, float64 [n_loops]."""
        return self.correct.mean(axis=0)

    @property
    def centered(self) -> np.ndarray:
        """Accuracy over what guessing scores, float64 [n_loops]."""
        return centered(self.accuracy, self.baseline)


def decide(kind: Kind, spans: np.ndarray, gold: int) -> np.ndarray:
    """Whether one example is right.

    spans: [n_rows, …], the rows' mean span losses (multiple choice, schema: the least one wins, the
    first on ties) or whether every target was the most likely token (language modeling). Returns
    bool […]. A NaN loss, of a diverged model, is never the least: it cannot be right by its place.
    """
    if kind == "language_modeling":
        return np.asarray(spans.astype(bool).all(axis=0))
    missing = np.isnan(spans)
    least = np.where(missing, np.inf, spans).argmin(axis=0)
    return (least == gold) & ~missing[gold]


def centered(accuracy: np.ndarray, baseline_percent: float) -> np.ndarray:
    """(accuracy − baseline) / (1 − baseline): 0 is guessing, 1 perfect, below 0 is worse."""
    baseline = 0.01 * baseline_percent
    return (accuracy - baseline) / (1 - baseline)


def core_mean(results: Sequence[TaskResult]) -> np.ndarray:
    """CORE: the unweighted mean of the centred accuracies, float64 [n_loops]."""
    if not results:
        raise ValueError("CORE of no tasks at all; evaluate at least one")
    return np.mean([result.centered for result in results], axis=0)


def format_csv(results: Sequence[TaskResult], loop_index: int) -> str:
    """The reference's result file at one loop count: Task, Accuracy, Centered; last row CORE."""
    lines = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
    for result in results:
        accuracy, above = result.accuracy[loop_index], result.centered[loop_index]
        lines.append(f"{result.name:<35}, {accuracy:<10.6f}, {above:<10.6f}")
    lines.append(f"{'CORE':<35}, {'':<10}, {core_mean(results)[loop_index]:<10.6f}")
    return "\n".join(lines) + "\n"


def format_table(results: Sequence[TaskResult], loop_counts: Sequence[int]) -> str:
    """Centred accuracies for the console: a line per task, a column per loop count, CORE below.

    The last column says how many prompts were cropped, of how many.
    """
    width = max(len(name) for name in ("task (centered)", *(result.name for result in results)))
    lines = [
        f"{'task (centered)':<{width}}"
        + "".join(f"{f'K={k}':>9}" for k in loop_counts)
        + f"{'cropped':>16}",
        *(
            f"{result.name:<{width}}{_cells(result.centered)}"
            + f"{f'{result.cropped} of {len(result.correct)}':>16}"
            for result in results
        ),
        f"{'CORE':<{width}}{_cells(core_mean(results))}",
    ]
    for result in results:
        if result.cut:
            size = len(result.correct)
            lines.append(f"{result.name}: {result.cut} of {size} answers cut to the model's length")
    return "\n".join(lines) + "\n"


def format_all(results: Sequence[TaskResult], loop_counts: Sequence[int]) -> str:
    """CSV of all loop counts: task, loops, examples, cropped, accuracy, centered; CORE last."""
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(("task", "loops", "examples", "cropped", "accuracy", "centered"))
    for result in results:
        for k, accuracy, above in zip(loop_counts, result.accuracy, result.centered, strict=True):
            told = (result.name, k, len(result.correct), result.cropped)
            lines.writerow((*told, f"{accuracy:.6f}", f"{above:.6f}"))
    examples = sum(len(result.correct) for result in results)
    cropped = sum(result.cropped for result in results)
    for k, value in zip(loop_counts, core_mean(results), strict=True):
        lines.writerow(("CORE", k, examples, cropped, "", f"{value:.6f}"))
    return table.getvalue()


def _cells(values: np.ndarray) -> str:
    return "".join(f"{value:>9.4f}" for value in values)
