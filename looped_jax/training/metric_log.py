"""The record of a run: TensorBoard scalars and one JSON line per step.

The training loop hands over the metrics of step t − 1 after it has dispatched step t, so reading
them never makes the device wait.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary

from looped_jax import files
from looped_jax.errors import DataError

SMOOTHING = 0.9
# Names of entries in logs of earlier versions, and what they are called now.
RENAMED = {
    "inside/stream_norm": "diagnostics/residual_norm",
    "loop/stream_norm": "loop/residual_norm",
    "inside/": "diagnostics/",
}


class MetricLog:
    """Writes <run_dir>/metrics.jsonl and <run_dir>/tensorboard.

    `start` is the step that the run continues from: later entries of an interrupted earlier run
    are dropped, since those steps are taken again.
    """

    def __init__(self, run_dir: str | Path, *, start: int):
        self.path = Path(run_dir) / "metrics.jsonl"
        _keep_until(self.path, start)
        self._file = self.path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        """Record scalars of `step` (1-based, steps taken); a list becomes name/0, name/1, …

        Lists of lists and dicts go on likewise: name/loop/layer, name/key.
        """
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        values = [
            Summary.Value(tag=tag, simple_value=scalar)
            for name, value in scalars.items()
            for tag, scalar in _leaves(name, value)
        ]
        # one event for all of them: one each takes more of Python's time than the rest of a step
        self._writer.file_writer.add_summary(Summary(value=values), step)

    def draw(self, step: int, name: str, figure: Figure) -> None:
        """Show a figure of `step` under TensorBoard's images."""
        self._writer.add_figure(name, figure, step)

    def close(self) -> None:
        self._file.close()
        self._writer.close()


def read_log(run_dir: str | Path) -> list[dict[str, Any]]:
    """The entries of <run_dir>/metrics.jsonl in order, each with its `step`; [] without the file.

    A last line that a kill cut short is left out. Raises DataError for damage anywhere else.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [
            {_current(name): value for name, value in json.loads(line).items()} for line in lines
        ]
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); move it away") from error


def _current(name: str) -> str:
    """The name of an entry as it is now."""
    old = next((old for old in RENAMED if name.startswith(old)), None)
    return RENAMED[old] + name.removeprefix(old) if old else name


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}/{key}", item)
    else:
        yield name, value


def _keep_until(path: Path, start: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line that a kill cut short
            continue
        if entry["step"] <= start:
            kept.append(line + "\n")
    files.write_text(path, "".join(kept))


class EMA:
    """Exponential moving average, unbiased from the first value on; its state survives a resume."""

    def __init__(self, state: dict[str, Any] | None = None, *, smoothing: float = SMOOTHING):
        self.smoothing = smoothing
        self.total: float = state["total"] if state else 0.0
        self.weight: float = state["weight"] if state else 0.0

    def update(self, value: float) -> float:
        self.total = self.smoothing * self.total + (1 - self.smoothing) * value
        self.weight = self.smoothing * self.weight + (1 - self.smoothing)
        return self.value

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else math.nan

    def state(self) -> dict[str, float]:
        return {"total": self.total, "weight": self.weight}
