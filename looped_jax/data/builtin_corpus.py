"""The builtin corpus: text that every machine with Python has, as parquet shards.

It is the standard library's sources and documentation strings.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from looped_jax import files
from looped_jax.errors import DataError

BUILTIN_TRAIN_SHARDS = 8
BUILTIN_VAL_SHARD = "shard_val.parquet"
_RECIPE = 2  # raise when the builtin corpus is made differently, so that no stale one is used
_DOCUMENT = 2_000
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3"}


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
        for i, text in enumerate([*_cut(source), *_cut(_docstrings(name, source))]):
            order = _hash(f"{name} {i}")
            train_shard = f"shard_{order % BUILTIN_TRAIN_SHARDS:05}.parquet"
            shard = BUILTIN_VAL_SHARD if validates(name) else train_shard
            shards.setdefault(shard, []).append((order, text))
    if len(shards) <= BUILTIN_TRAIN_SHARDS:
        raise DataError(
            f"data.path: builtin needs the sources of Python's standard library, but "
            f"{sysconfig.get_path('stdlib')} holds too few; install them (Debian has them in "
            "libpython3-stdlib), or give text of your own, a file or a folder"
        )
    with files.new_folder(folder) as part:
        for shard, documents in shards.items():
            column = pa.array([text for _, text in sorted(documents)], pa.string())
            table = pa.table({"text": column})
            pq.write_table(table, part / shard, row_group_size=64, compression="zstd")
    return folder


def validates(module: str) -> bool:
    """Whether the module of that dotted name is validation text: one of 25."""
    return _hash(module) % 25 == 0


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
