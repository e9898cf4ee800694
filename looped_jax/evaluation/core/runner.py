"""The run through all tasks: rows to the scorer in big lists, finished tasks to a file.

The file makes a killed evaluation continue with the task it was in. Its first line says what is
evaluated; each further line holds one task's decisions, example by example.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from looped_jax import files
from looped_jax.errors import UserError
from looped_jax.evaluation.core.bundle import Bundle, Task, draw
from looped_jax.evaluation.core.metric import TaskResult, decide
from looped_jax.evaluation.core.prompts import Encode, Row, rows

# rows -> mean span loss [n_rows, n_loops], every target the most likely token [n_rows, n_loops]
ScoreRows = Callable[[list[Row]], tuple[np.ndarray, np.ndarray]]
# task, examples done, examples in all
OnProgress = Callable[[str, int, int], None]
Json = dict[str, Any]


class ResumeError(UserError, ValueError):
    """A state file that belongs to another evaluation, or that is damaged."""


def evaluate_tasks(
    bundle: Bundle,
    encode: Encode,
    bos_id: int,
    score_rows: ScoreRows,
    *,
    loop_counts: Sequence[int],
    max_len: int,
    max_per_task: int | None = None,
    rows_per_call: int = 1024,
    state_file: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    writes: bool = True,
    on_progress: OnProgress | None = None,
) -> list[TaskResult]:
    """Evaluate every task of the bundle at every loop count, in order.

    `score_rows` gets at least `rows_per_call` rows at once (fewer at a task's end), all candidates
    of an example together, and sees the rows in a fixed order; what it returns for an empty span
    does not matter. Tasks finished in `state_file` are not run again. `identity` says, as JSON
    values, what is evaluated (checkpoint, tokenizer); of several processes only one `writes`.
    Raises ResumeError if the state file is of another identity, bundle or setting, BundleError or
    PromptError for a bad example, ValueError if the scorer returns other shapes.
    """
    drawn = [draw(task, max_per_task) for task in bundle.tasks]  # all bad settings show at once
    header: Json = {
        **json.loads(json.dumps(identity or {})),
        "bundle": bundle.digest,
        "loop_counts": list(loop_counts),
        "max_len": max_len,
        "max_per_task": max_per_task,
    }
    state_path = None if state_file is None else Path(state_file)
    finished = {} if state_path is None else _open_state(state_path, header, writes)
    results = []
    for task in drawn:
        if task.name in finished:
            assert state_path is not None
            results.append(_from_json(finished[task.name], task, loop_counts, state_path))
            continue
        result = TaskResult(
            task.name,
            task.baseline,
            *_run(
                task,
                encode,
                bos_id,
                score_rows,
                len(loop_counts),
                max_len,
                rows_per_call,
                on_progress,
            ),
        )
        if state_path is not None and writes:
            _append(state_path, _to_json(result, loop_counts))
        results.append(result)
    return results


def _run(
    task: Task,
    encode: Encode,
    bos_id: int,
    score_rows: ScoreRows,
    n_loops: int,
    max_len: int,
    rows_per_call: int,
    on_progress: OnProgress | None,
) -> tuple[np.ndarray, int, int]:
    """Decisions, bool [n_examples, n_loops], and how many examples were cropped, and cut."""
    correct: list[np.ndarray] = []
    cropped = cut = 0
    for examples in _chunks(task, encode, bos_id, max_len, rows_per_call):
        flat = [row for example in examples for row in example]
        losses, exact = (np.asarray(values) for values in score_rows(flat))
        for name, values in (("mean losses", losses), ("all-correct flags", exact)):
            if values.shape != (len(flat), n_loops):
                raise ValueError(
                    f"the scorer's {name} have shape {values.shape}; "
                    f"return [rows, loop counts] = {(len(flat), n_loops)}"
                )
        losses = losses.astype(np.float64)
        spans = exact if task.kind == "language_modeling" else losses
        first = 0
        for example in examples:
            gold = task.items[len(correct)].gold
            candidates = spans[first : first + len(example)]
            if task.kind != "language_modeling":
                _settle_empty(candidates, example)
            correct.append(decide(task.kind, candidates, gold))
            cropped += any(row.cropped for row in example)
            cut += any(row.cut for row in example)
            first += len(example)
        if on_progress is not None:
            on_progress(task.name, len(correct), len(task.items))
    return np.stack(correct), cropped, cut


def _settle_empty(losses: np.ndarray, example: list[Row]) -> None:
    """Give empty spans, which have no mean, the outcome that they have in the reference.

    There the mean is NaN and Python's min decides: it keeps a NaN that comes first and never takes
    a later one. With GPT-2's tokenizer this concerns 4 of piqa's 1838 examples.
    """
    for index, row in enumerate(example):
        if row.start == row.end:
            losses[index] = np.inf if index else -np.inf


def _chunks(
    task: Task, encode: Encode, bos_id: int, max_len: int, rows_per_call: int
) -> Iterator[list[list[Row]]]:
    """Whole examples, as their rows, until a chunk has `rows_per_call` rows."""
    chunk: list[list[Row]] = []
    for index in range(len(task.items)):
        chunk.append(rows(task, index, encode, bos_id, max_len))
        if sum(map(len, chunk)) >= rows_per_call:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _open_state(path: Path, header: Json, writes: bool) -> dict[str, Json]:
    """The finished tasks of a state file, by name; creates the file if there is none."""
    if not path.exists():
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            _append(part, header)
            os.replace(part, path)
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = []
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise ResumeError(f"{path}, line {number}: not JSON; delete the file") from None
    if not lines:
        raise ResumeError(f"{path}: not an evaluation's state file; give another name")
    found, *tasks = lines
    if not all(isinstance(line, dict) for line in lines) or any("task" not in t for t in tasks):
        raise ResumeError(f"{path}: not an evaluation's state file; give another name")
    if found != header:
        different = [
            f"{key} is {found.get(key)!r} there and {header.get(key)!r} here"
            for key in sorted({*found, *header})
            if found.get(key) != header.get(key)
        ]
        raise ResumeError(
            f"{path} belongs to another evaluation: {'; '.join(different)}; "
            "give another file or delete this one"
        )
    if writes and whole < len(content):  # the line that a kill cut short
        os.truncate(path, whole)
    return {task["task"]: task for task in tasks}


def _append(path: Path, line: Json) -> None:
    """Add one line by a single write: a kill leaves it whole, absent or without its newline."""
    with path.open("ab", buffering=0) as file:
        file.write(files.to_json(line, ensure_ascii=False).encode() + b"\n")
        os.fsync(file.fileno())


def _to_json(result: TaskResult, loop_counts: Sequence[int]) -> Json:
    """Decisions as one 0 or 1 per example, a text per loop count."""
    decisions = {
        str(count): "".join("01"[int(right)] for right in result.correct[:, index])
        for index, count in enumerate(loop_counts)
    }
    return {"task": result.name, "cropped": result.cropped, "cut": result.cut, "correct": decisions}


def _from_json(line: Json, task: Task, loop_counts: Sequence[int], path: Path) -> TaskResult:
    if "cropped" not in line:
        raise ResumeError(f"{path} was written by an earlier version; delete the file")
    columns = [line["correct"].get(str(count), "") for count in loop_counts]
    if any(len(column) != len(task.items) or set(column) - {"0", "1"} for column in columns):
        raise ResumeError(
            f"{path}: task {task.name} does not hold {len(task.items)} decisions per loop count; "
            "delete the file"
        )
    correct = np.array([[digit == "1" for digit in column] for column in columns]).T
    return TaskResult(task.name, task.baseline, correct, line["cropped"], line["cut"])
