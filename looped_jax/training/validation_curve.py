"""How validation went, step by step and loop by loop: for the console, and validation.png."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

from looped_jax import files
from looped_jax.training.metric_log import read_log

NAME = "validation.png"
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
        name = re.compile(rf"val/{re.escape(metric)}_loops_(\d+)")
        scores: dict[int, dict[int, float]] = {}
        for entry in read_log(run_dir):
            found = ((name.fullmatch(key), value) for key, value in entry.items())
            if by_loops := {int(key[1]): value for key, value in found if key}:
                scores[entry["step"]] = by_loops
        return cls(metric, trained, scores)

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
        from looped_jax.plotting import figures

        lines = {
            k: {step: by_loops[k] for step, by_loops in self.scores.items() if k in by_loops}
            for k in self.loop_counts
        }
        image = io.BytesIO()
        figure = figures.validation_by_loops(lines, metric=self.metric, trained=self.trained)
        figure.savefig(image, format="png", dpi=130)
        files.write_bytes(run_dir / NAME, image.getvalue())
