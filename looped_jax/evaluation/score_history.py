"""Scores of many checkpoints of one run: a table for the console, a curve and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from looped_jax.evaluation.evaluator import Scores, cell

NAME = "all_steps"  # of the figure's files
OF_A_TASK = "core "  # begins the names of what only the figure shows


class ScoreHistory:
    """What each checkpoint scored, metric by metric, at the same loop counts."""

    def __init__(self, loops: Sequence[int], *, trained: int):
        self.loops, self.trained = tuple(loops), trained
        self.scores: dict[str, dict[int, list[float]]] = {}  # metric -> step -> a value per count

    def add(self, step: int, scores: Scores) -> None:
        for metric, values in scores.items():
            self.scores.setdefault(metric, {})[step] = list(values)

    def by_loops(self) -> Mapping[str, Mapping[int, Mapping[int, float]]]:
        """Metric -> loop count -> step -> value."""
        return {
            metric: {
                k: {step: values[index] for step, values in steps.items()}
                for index, k in enumerate(self.loops)
            }
            for metric, steps in self.scores.items()
        }

    def __str__(self) -> str:
        """A block per metric, a line per step, a column per loop count; not of each CORE task."""
        heads = [f"{k} loops" if k > 1 else "1 loop" for k in self.loops]
        blocks = []
        for metric, steps in self.scores.items():
            if metric.startswith(OF_A_TASK):
                continue
            lines = [metric, f"  {'step':>8}" + "".join(f"{head:>12}" for head in heads)]
            for step, values in sorted(steps.items()):
                lines.append(f"  {step:>8}" + "".join(f"{cell(v):>12}" for v in values))
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)

    def draw(self, folder: Path) -> None:
        """all_steps.png, .svg, .pdf, and the numbers as .csv."""
        from looped_jax.plotting import figure_files, figures  # slow to import

        figure = figures.against_steps(self.by_loops(), trained=self.trained)
        figure_files.save(figure, folder / NAME)
