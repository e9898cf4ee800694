"""Which files are trained on, which one validates, and whether they are fit for it.

A corpus is a folder of parquet shards with one string column `text`. The builtin one is made from
text that every machine with Python has: the standard library's sources and documentation strings.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from looped_jax import files
from looped_jax.config.settings import DataConfig
from looped_jax.errors import DataError

BUILTIN_TRAIN_SHARDS = 8
BUILTIN_VAL_SHARD = "shard_val.parquet"
_RECIPE = 2  # raise when the builtin corpus is made differently, so that no stale one is used
_DOCUMENT = 2_000
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3"}
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)


@dataclass(frozen=True)
class Corpus:
    """Shards to train on, in reading order, and the one to validate on."""

    train: tuple[Path, ...]
    val: Path

    @classmethod
    def open(cls, data: DataConfig) -> Corpus:
        """The shards of folder data.path, or of the builtin corpus; all of them are checked.

        Validation is the named shard, or builtin's own, or the last by name; training takes the
        first `data.train_shards` of the others, by name. Raises DataError that names file and mend.
        """
        if data.path == "builtin":
            folder = build_builtin(files.default_cache_dir())
            val_shard: str | None = data.val_shard or BUILTIN_VAL_SHARD
        else:
            folder, val_shard = Path(data.path), data.val_shard
        if not folder.is_dir():
            raise DataError(
                f"data.path: there is no folder {folder}; put parquet shards with a `text` column "
                "there, or use --config.data.path=builtin"
            )
        shards = sorted(folder.glob("*.parquet"))
        if not shards:
            raise DataError(f"data.path: {folder} holds no *.parquet file; give a folder that does")
        val = folder / val_shard if val_shard else shards[-1]
        if val not in shards:
            raise DataError(
                f"data.val_shard: {folder} holds no {val_shard}; choose one that it holds, "
                f"such as {shards[-1].name}"
            )
        train, needed = [shard for shard in shards if shard != val], data.train_shards or 1
        if len(train) < needed:
            raise DataError(
                f"data.path: {folder} holds {len(shards)} shards, but {needed} for training and "
                f"{val.name} for validation are needed; add shards"
                + (" or lower data.train_shards" if data.train_shards else "")
            )
        corpus = cls(tuple(train[: data.train_shards]), val)
        for shard in (*corpus.train, corpus.val):
            _check(shard)
        return corpus

    def fingerprint(self) -> dict[str, Any]:
        """What two corpora of the same text share, from parquet footers alone; ready for JSON."""
        return {"val": _describe(self.val), "train": [_describe(path) for path in self.train]}


def _check(path: Path) -> None:
    """Raise DataError unless the shard is a whole parquet file with text in it."""
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            if "text" not in schema.names:
                raise DataError(
                    f"{path} has no column `text`, only {', '.join(schema.names)}; rename one"
                )
            kind = schema.field("text").type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: column `text` is of type {kind}, not string; convert it")
            if not rows:
                raise DataError(f"{path} has no rows; remove it or download it again")
            if not any(_texts(file, group) for group in range(file.num_row_groups)):
                raise DataError(f"{path}: column `text` is empty; remove it or download it again")
    except _UNREADABLE as error:
        raise DataError(f"{path} is damaged ({_reason(error)}); download it again") from error


def _texts(file: pq.ParquetFile, group: int) -> list[str]:
    return [text for text in file.read_row_group(group, ["text"])["text"].to_pylist() if text]


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _describe(path: Path) -> dict[str, Any]:
    # The footer holds every column chunk's place, size and, mostly, smallest and largest text.
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        footer = file.read(length)
    metadata = pq.read_metadata(path)
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "rows": metadata.num_rows,
        "row_groups": metadata.num_row_groups,
        "footer_sha256": hashlib.sha256(footer).hexdigest()[:16],
    }


class RowGroups:
    """Random access to the texts of row group i, counted over `shards` in order.

    Empty and null documents are left out. Keeps paths, not open files, so that worker processes
    can have it. Raises DataError that names shard and row group when one cannot be read.
    """

    def __init__(self, shards: Sequence[Path]):
        self._index = [
            (path, group)
            for path in shards
            for group in range(pq.read_metadata(path).num_row_groups)
        ]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> list[str]:
        path, group = self._index[i]
        try:
            with pq.ParquetFile(path) as file:
                return _texts(file, group)
        except _UNREADABLE as error:
            raise DataError(
                f"{path}: row group {group} is damaged ({_reason(error)}); download the shard again"
            ) from error


# --- the builtin corpus ---------------------------------------------------------------------------


def build_builtin(cache_dir: Path) -> Path:
    """Folder of the builtin corpus, written on first use; the same Python writes the same bytes.

    A module's source and its documentation strings are cut at blank lines into documents of about
    2,000 characters, which a hash of their name spreads over shards and puts into order, so that
    neighbours are not all of one module. Validation takes whole modules: it shares none with
    training.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    folder = cache_dir / f"builtin-python{version}-recipe{_RECIPE}"
    if folder.is_dir():
        return folder
    print(f"writing the builtin corpus to {folder} (once) ...", flush=True)
    shards: dict[str, list[tuple[int, str]]] = {}
    for name, source in _modules():
        validates = _hash(name) % 25 == 0
        for i, text in enumerate([*_cut(source), *_cut(_docstrings(name, source))]):
            order = _hash(f"{name} {i}")
            train_shard = f"shard_{order % BUILTIN_TRAIN_SHARDS:05}.parquet"
            shard = BUILTIN_VAL_SHARD if validates else train_shard
            shards.setdefault(shard, []).append((order, text))
    if len(shards) <= BUILTIN_TRAIN_SHARDS:
        raise DataError(
            f"data.path: builtin needs the sources of Python's standard library, but "
            f"{sysconfig.get_path('stdlib')} holds too few; give a folder of parquet shards"
        )
    with files.new_folder(folder) as part:
        for shard, documents in shards.items():
            column = pa.array([text for _, text in sorted(documents)], pa.string())
            table = pa.table({"text": column})
            pq.write_table(table, part / shard, row_group_size=64, compression="zstd")
    return folder


def _modules() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of every module of the standard library that is the same everywhere."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        # site-packages and config-3.x-<platform> cannot be imported by that name: no modules of it
        importable = all(part.isidentifier() for part in parts)
        machine_specific = path.name.startswith("_sysconfigdata") or path.is_symlink()
        if not importable or machine_specific or _LEFT_OUT.intersection(parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if source.strip():
            yield ".".join(parts), source


def _docstrings(name: str, source: str) -> str:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    parts: list[str] = []

    def visit(node: ast.AST, qualified: str) -> None:
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            parts.append(f"{qualified}\n\n{text}\n")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, kinds[1:]):
                visit(child, f"{qualified}.{child.name}")

    visit(tree, name)
    return "\n".join(parts)


def _cut(text: str) -> list[str]:
    """Documents of at least _DOCUMENT characters, but the last, each ending at a blank line."""
    documents, lines, size = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= _DOCUMENT and not line.strip():
            documents.append("".join(lines))
            lines, size = [], 0
    return [document for document in (*documents, "".join(lines)) if document.strip()]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
