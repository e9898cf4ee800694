"""How validation went, step by step and loop by loop: for the console, and as a figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from looped_jax.training.metric_log import read_log, validations

NAME = "validation"  # of the figure's files
LINES = 10  # of steps on the console


@dataclass(frozen=True)
class ValidationCurve:
    """All validations of a run, also of the time before it was resumed.

    metric: the one that checkpoints are judged by; trained: the loop count of training
    scores: step -> loop count -> value
    """

    metric: str
    trained: int
    scores: dict[int, dict[int, float]]

    @classmethod
    def read(cls, run_dir: Path, *, metric: str, trained: int) -> ValidationCurve:
        """From the log of the run in `run_dir`."""
        scores = validations(read_log(run_dir))
        return cls(
            metric, trained, {step: of[metric] for step, of in scores.items() if metric in of}
        )

    @property
    def loop_counts(self) -> list[int]:
        return sorted({k for by_loops in self.scores.values() for k in by_loops})

    def __str__(self) -> str:
        """A line per step, of many steps the first, the last and some between, evenly."""
        steps = sorted(self.scores)
        last = len(steps) - 1
        shown = sorted({round(i * last / (LINES - 1)) for i in range(LINES)}) if last > 0 else [0]
        heads = [f"{k} loops" if k > 1 else "1 loop" for k in self.loop_counts]
        lines = [
            f"validation, {self.metric}",
            f"  {'step':>8}" + "".join(f"{h:>10}" for h in heads),
        ]
        for step in (steps[i] for i in shown):
            values = (self.scores[step].get(k) for k in self.loop_counts)
            cells = ("" if value is None else f"{value:.4f}" for value in values)
            lines.append(f"  {step:>8}" + "".join(f"{cell:>10}" for cell in cells))
        return "\n".join(lines)

    def draw(self, run_dir: Path) -> None:
        """Into the run's folder. Raises ImportError without matplotlib; nothing else needs it."""
        from looped_jax.plotting import figure_files, figures

        lines = {
            k: {step: by_loops[k] for step, by_loops in self.scores.items() if k in by_loops}
            for k in self.loop_counts
        }
        figure = figures.validation_by_loops(lines, metric=self.metric, trained=self.trained)
        figure_files.save(figure, run_dir / NAME)
