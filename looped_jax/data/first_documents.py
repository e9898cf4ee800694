"""The first N documents of a data set of the hub, from as few of its files as hold them.

They arrive whole and are checked as all downloads are; what is written of them are the documents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from looped_jax.data.datasets import RemoteFile
from looped_jax.data.fetch import fetch
from looped_jax.errors import DataError

_ROW_GROUP = 1_000  # documents
_SCHEMA = pa.schema([("text", pa.string())])
Progress = Callable[[str, int, int | None], None]  # a file's name, bytes so far, bytes in all


def download(
    wanted: Sequence[RemoteFile],
    count: int,
    folder: Path,
    *,
    progress: Progress = lambda *of: None,
    **settings: Any,
) -> Path:
    """Write <folder>/first_<count>.parquet, and return it; `settings` are fetch's.

    A file of `wanted` that lies in `folder` already is taken from there. Stopped and called again
    it goes on. Raises DataError, also when all of them hold fewer documents.
    """
    path, raw = folder / f"first_{count}.parquet", folder / "raw"
    if path.is_file() and pq.read_metadata(path).num_rows == count:
        return path
    sources: list[Path] = []
    have = 0
    for file in wanted:
        here = folder / file.name
        sources.append(
            here
            if here.is_file()
            else fetch(
                file.url,
                raw / file.name,
                size=file.size,
                sha256=file.sha256,
                check=file.check,
                progress=functools.partial(progress, file.name),
                **settings,
            )
        )
        have += pq.read_metadata(sources[-1]).num_rows
        if have >= count:
            break
    if have < count:
        raise DataError(f"--documents={count}: there are {have} in all; give as many, or leave it")
    part = path.with_name(f".{path.name}.part")
    with pq.ParquetWriter(part, _SCHEMA, compression="zstd") as writer:
        for table in _first(sources, count):
            writer.write_table(table, row_group_size=_ROW_GROUP)
    part.replace(path)
    for source in sources:
        if source.parent == raw:
            source.unlink()
    if raw.is_dir() and not any(raw.iterdir()):
        raw.rmdir()
    return path


def _first(sources: Sequence[Path], count: int) -> Iterator[pa.Table]:
    """Tables of one column `text` with `count` rows in all, _ROW_GROUP at most in each."""
    for source in sources:
        with pq.ParquetFile(source) as file:
            for batch in file.iter_batches(_ROW_GROUP, columns=["text"]):
                if not count:
                    return
                table = pa.Table.from_batches([batch]).cast(_SCHEMA).slice(0, count)
                count -= len(table)
                yield table
