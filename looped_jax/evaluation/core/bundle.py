"""The CORE bundle on disk: which tasks, their items, and what guessing would score.

core.yaml                          the tasks in order: kind, number of shots, delimiter
eval_meta_data.csv                 random baselines, in percent
eval_data/<category>/<task>.jsonl  one item a line
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml  # type: ignore[import-untyped, unused-ignore]

from looped_jax import files
from looped_jax.errors import UserError

Kind = Literal["multiple_choice", "schema", "language_modeling"]
KINDS: tuple[Kind, ...] = ("multiple_choice", "schema", "language_modeling")

SHUFFLE_SEED = 1337
DEFAULT_DELIMITER = " "


class BundleError(UserError, ValueError):
    """A bundle that lacks something or holds something that cannot be read."""


@dataclass(frozen=True)
class Item:
    """One example as its candidate texts: contexts[i] + delimiter + continuations[i].

    Multiple choice varies the continuation, a schema varies the context, and language modeling has
    one candidate. `gold` is the right one's index.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """A task and its items; `shots` are drawn for each item from the other items."""

    name: str
    kind: Kind
    shots: int
    delimiter: str
    baseline: float  # accuracy of guessing, percent
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Bundle:
    """The tasks in the order of core.yaml; `digest` is the SHA-256 of every file they come from."""

    tasks: tuple[Task, ...]
    digest: str


def cached_bundle() -> Path:
    """Where the bundle is kept for all runs once it has been downloaded."""
    return files.default_cache_dir() / "eval_bundle"


def load_bundle(folder: str | Path) -> Bundle:
    """Read a whole bundle, items included, so that a bad line shows before any scoring.

    Raises BundleError naming the file, and the line or the task where there is one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"no CORE bundle at {folder}: give the folder that holds core.yaml")
    list_path, meta_path = folder / "core.yaml", folder / "eval_meta_data.csv"
    listing, meta = _read(list_path), _read(meta_path)
    baselines = _baselines(meta_path, meta)
    tasks, contents = [], {list_path: listing, meta_path: meta}
    for index, entry in enumerate(_entries(list_path, listing)):
        name, kind, shots, delimiter, uri = _entry(list_path, index, entry)
        if name not in baselines:
            raise BundleError(f"{meta_path}: no row for the task {name!r} of core.yaml; add one")
        path = folder / "eval_data" / uri
        if path not in contents:
            contents[path] = _read(path)
        items = load_task(path, kind, contents[path])
        tasks.append(Task(name, kind, shots, delimiter, baselines[name], items))
    digest = hashlib.sha256()
    for path, content in sorted(contents.items()):
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return Bundle(tuple(tasks), digest.hexdigest())


def load_task(path: str | Path, kind: Kind, content: bytes | None = None) -> tuple[Item, ...]:
    """Read the items of one jsonl file (or of its `content`, already read), in file order.

    Raises BundleError naming the file and the line.
    """
    path = Path(path)
    items = []
    # Not splitlines(): it would also break at separators that may stand inside a text.
    for number, line in enumerate((_read(path) if content is None else content).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(_item(kind, json.loads(line)))
        except UnicodeDecodeError as error:
            raise BundleError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
        except json.JSONDecodeError as error:
            message = f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})"
            raise BundleError(message) from None
        except BundleError as error:
            raise BundleError(f"{path}, line {number}: {error}") from None
    if not items:
        raise BundleError(f"{path}: no items; fetch the bundle again")
    return tuple(items)


def draw(task: Task, max_per_task: int | None) -> Task:
    """The task as it is evaluated: shuffled, then cut to `max_per_task` items (None: all).

    Shots come from the items that are left, so a cut task is not a subsample of the whole one.
    Raises BundleError if too few items are left to draw shots from.
    """
    if max_per_task is not None and max_per_task < 1:
        raise BundleError(f"max_per_task={max_per_task} is not positive; use None for all items")
    items = list(task.items)
    random.Random(SHUFFLE_SEED).shuffle(items)
    items = items[:max_per_task]
    if len(items) <= task.shots:
        raise BundleError(
            f"task {task.name}: {len(items)} items (max_per_task={max_per_task}) cannot give each "
            f"one {task.shots} shots from the others; use at least {task.shots + 1}"
        )
    return dataclasses.replace(task, items=tuple(items))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); fetch the bundle again"
        raise BundleError(message) from None


def _entries(path: Path, content: bytes) -> list[Any]:
    try:
        listing = yaml.safe_load(content)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", "unreadable")
        raise BundleError(f"{path}{place}: not YAML ({problem})") from None
    entries = listing.get("icl_tasks") if isinstance(listing, dict) else None
    if not isinstance(entries, list) or not entries:
        raise BundleError(f"{path}: no list of tasks under the key icl_tasks")
    return entries


def _entry(path: Path, index: int, entry: Any) -> tuple[str, Kind, int, str, str]:
    if not isinstance(entry, dict):
        raise BundleError(f"{path}: task {index} is {entry!r}, not a mapping")
    name = entry.get("label", index)

    def bad(key: str, wanted: str) -> BundleError:
        return BundleError(f"{path}: task {name}: {key}={entry.get(key)!r} is not {wanted}")

    for key in ("label", "dataset_uri"):
        if not isinstance(entry.get(key), str):
            raise bad(key, "a text")
    kind = entry.get("icl_task_type")
    if kind not in KINDS:
        raise bad("icl_task_type", "one of " + ", ".join(KINDS))
    shots = entry.get("num_fewshot")
    if not (isinstance(shots, list) and len(shots) == 1 and _is_count(shots[0])):
        raise bad("num_fewshot", "a list of one number, such as [10]")
    delimiter = entry.get("continuation_delimiter", DEFAULT_DELIMITER)
    if not isinstance(delimiter, str):
        raise bad("continuation_delimiter", "a text")
    return name, cast(Kind, kind), shots[0], delimiter, entry["dataset_uri"]


def _baselines(path: Path, content: bytes) -> dict[str, float]:
    try:
        table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        missing = {"Eval Task", "Random baseline"} - set(table.fieldnames or ())
        if missing:
            raise BundleError(f"{path}: no column {' nor '.join(map(repr, sorted(missing)))}")
        baselines = {}
        for row in table:
            try:
                baseline = float(row["Random baseline"])
            except (TypeError, ValueError):
                baseline = -1.0
            if not 0 <= baseline < 100:
                raise BundleError(
                    f"{path}, line {table.line_num}: Random baseline={row['Random baseline']!r} "
                    "is not a percentage below 100"
                )
            baselines[row["Eval Task"]] = baseline
    except (UnicodeDecodeError, csv.Error) as error:
        raise BundleError(f"{path}: not a CSV file ({error})") from None
    return baselines


def _item(kind: Kind, fields: Any) -> Item:
    """Raises BundleError without the place, which the caller knows."""
    if not isinstance(fields, dict):
        raise BundleError("not a JSON object")
    if kind == "language_modeling":
        return Item((_text(fields, "context").strip(),), (_text(fields, "continuation"),), 0)
    if kind == "multiple_choice":
        continuations = _texts(fields, "choices")
        contexts = (_text(fields, "query"),) * len(continuations)
    else:
        contexts = _texts(fields, "context_options")
        continuations = (_text(fields, "continuation"),) * len(contexts)
    gold = _field(fields, "gold")
    if not (_is_count(gold) and gold < len(contexts)):
        raise BundleError(f"gold={gold!r} is not an index of its {len(contexts)} options")
    return Item(contexts, continuations, gold)


def _field(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise BundleError(f"no field {name!r}; it has {', '.join(sorted(fields)) or 'none'}")
    return fields[name]


def _text(fields: dict[str, Any], name: str) -> str:
    value = _field(fields, name)
    if not isinstance(value, str):
        raise BundleError(f"{name}={value!r} is not a text")
    return value


def _texts(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    value = _field(fields, name)
    if not (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        raise BundleError(f"{name}={value!r} is not a list of texts")
    return tuple(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
