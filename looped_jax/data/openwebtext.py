"""OpenWebText has no split for validation; nanoGPT's, drawn by a seed, is taken out of it here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from looped_jax import files


def held_out(documents: int, *, share: float = 0.0005, seed: int = 2357) -> np.ndarray:
    """Numbers of those that validate: what `train_test_split` of Hugging Face's datasets draws."""
    order = np.random.default_rng(seed).permutation(documents)
    return order[: math.ceil(share * documents)]


def split(names: Sequence[str], raw: Path, out: Path) -> None:
    """Of the files `names` in `raw`, write validation.parquet and the rest of each to `out`.

    Each raw file is removed when its rest is written, so that the disk holds little twice. Stopped
    and called again it goes on: validation is written before anything is removed.
    """
    counted = out / "rows.json"
    if not counted.is_file():
        rows = {name: pq.read_metadata(raw / name).num_rows for name in names}
        files.write_json(counted, rows)
    rows = json.loads(counted.read_text("utf-8"))
    ends = np.cumsum([rows[name] for name in names])
    chosen = held_out(int(ends[-1]))
    own = {name: np.sort(chosen[(chosen >= end - rows[name]) & (chosen < end)]) - (end - rows[name])
           for name, end in zip(names, ends, strict=True)}  # fmt: skip
    if not (out / "validation.parquet").is_file():
        tables = [pq.read_table(raw / name, columns=["text"]).take(own[name]) for name in names]
        in_order = np.argsort(np.argsort(chosen))  # as the draw has them, not as the files do
        _write(out / "validation.parquet", [pa.concat_tables(tables).take(in_order)])
    for name in names:
        if not (raw / name).is_file():
            continue
        if not (out / name).is_file():
            _write(out / name, _without(raw / name, own[name]))
        (raw / name).unlink()


def _without(path: Path, left_out: np.ndarray) -> Iterator[pa.Table]:
    """Tables of a file's row groups without the rows of these numbers."""
    start = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, ["text"])
            kept = ~np.isin(np.arange(start, start + len(table)), left_out)
            start += len(table)
            yield table.filter(pa.array(kept))


def _write(path: Path, tables: Iterable[pa.Table]) -> None:
    part = path.with_name(f".{path.name}.part")
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(part, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=1_000)
    part.replace(path)
