"""The record of a run: TensorBoard scalars, texts and figures, and one JSON line per entry.

The training loop hands over the metrics of step t − 1 after it has dispatched step t, so reading
them never makes the device wait.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looped_jax import files
from looped_jax.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 0.9
TEXT_INDENT = "  "
SCORE = re.compile(r"(?:val/|(?=core/mean))(.+)_loops_(\d+)")  # entries that are scores
# Names of entries in logs of earlier versions, and what they are called now.
RENAMED = {
    "inside/stream_norm": "diagnostics/residual_norm",
    "loop/stream_norm": "loop/residual_norm",
    "inside/": "diagnostics/",
}


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation beside validation has to say of one step.

    lines: for the console; scalars: as MetricLog.write takes them; texts: by name, as write_text
    """

    lines: list[str] = field(default_factory=list)
    scalars: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class MetricLog:
    """Writes <run_dir>/metrics.jsonl, <run_dir>/metrics/*.txt and <run_dir>/tensorboard.

    `start` is the step that the run continues from: later entries of an interrupted earlier run
    are dropped, since those steps are taken again. A run that starts anew keeps none.
    """

    def __init__(self, run_dir: str | Path, *, start: int):
        self.path, self._texts = Path(run_dir) / "metrics.jsonl", Path(run_dir) / "metrics"
        _keep_until(self.path, start)
        for path in self._texts.glob("*.txt"):
            _keep_texts_until(path, start)
        from tensorboardX import SummaryWriter  # which takes all of PyTorch along if it is here

        self._file = self.path.open("a", encoding="utf-8")
        taken_again = start + 1 if start else 0
        self._writer = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=taken_again)

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        """Record scalars of `step` (steps taken, 0 before the first); lists as name/0, name/1, …

        Lists of lists and dicts go on likewise: name/loop/layer, name/key. What is not finite is
        null in the file, which JSON has no other word for.
        """
        from tensorboardX.proto.summary_pb2 import Summary

        self._file.write(files.to_json({"step": step, **scalars}) + "\n")
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

    def write_text(self, step: int, name: str, text: str) -> None:
        """Show a text of `step` under TensorBoard's texts, and add it to metrics/<name>.txt."""
        indented = textwrap.indent(text.rstrip("\n"), TEXT_INDENT, lambda line: True)
        self._writer.add_text(name, textwrap.indent(text, " " * 4), step)  # as it is, in Markdown
        path = self._texts / f"{name}.txt"
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        files.write_text(path, f"{before}step {step}\n{indented}\n")

    def close(self) -> None:
        self._file.close()
        self._writer.close()


def read_log(run_dir: str | Path) -> list[dict[str, Any]]:
    """The entries of <run_dir>/metrics.jsonl in order, each with its `step`; [] without the file.

    A last line that a kill cut short is left out; null is read as NaN. Raises DataError for damage
    anywhere else.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [
            {_current(name): _nan_for_null(value) for name, value in json.loads(line).items()}
            for line in lines
        ]
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); move it away") from error


def validations(entries: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, dict[int, float]]]:
    """What validations found, and CORE while training, in entries of a log.

    Step -> metric -> loop count -> value, in the order of steps.
    """
    found: dict[int, dict[str, dict[int, float]]] = {}
    for entry in entries:
        for name, value in entry.items():
            if match := SCORE.fullmatch(name):
                of_step = found.setdefault(entry["step"], {})
                of_step.setdefault(match[1], {})[int(match[2])] = value
    return dict(sorted(found.items()))


def _current(name: str) -> str:
    """The name of an entry as it is now."""
    old = next((old for old in RENAMED if name.startswith(old)), None)
    return RENAMED[old] + name.removeprefix(old) if old else name


def _nan_for_null(value: Any) -> Any:
    if isinstance(value, list):
        return [_nan_for_null(item) for item in value]
    if isinstance(value, dict):
        return {key: _nan_for_null(item) for key, item in value.items()}
    return math.nan if value is None else value


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
        if start and entry["step"] <= start:
            kept.append(line + "\n")
    files.write_text(path, "".join(kept))


def _keep_texts_until(path: Path, start: int) -> None:
    """Drop what a file of `write_text` tells of later steps; its texts are indented, steps not."""
    parts = re.split(r"^(?=step \d+$)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kept = [part for part in parts[1:] if start and int(part.split()[1]) <= start]
    if parts[0]:  # not one of ours
        return
    if kept:
        files.write_text(path, "".join(kept))
    else:
        path.unlink()


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
