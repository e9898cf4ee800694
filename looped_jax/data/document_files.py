"""Files of documents, read a row group at a time; parquet is the kind that is made for it.

Plain text and JSON lines are in text_files.py; files whose documents are tokens already, not texts,
in token_files.py.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from looped_jax.errors import DataError

Document = str | np.ndarray  # a text, or its tokens, int32
_PART = 16 << 20  # bytes of a parquet file's row group: larger ones are read in parts
_READ_AT_ONCE = 256  # documents
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)


@dataclass(frozen=True)
class Share:
    """Of a file's documents those that validate, or the others.

    A hash of its text, or of its tokens, decides for each document. So both kinds are spread over
    the whole file, the same text, should it be there twice, is never in both, and more documents
    move none of the old.
    """

    of_all: float  # share of documents that validate, 0 … 1
    validates: bool

    def __contains__(self, document: Document) -> bool:
        content = document.encode() if isinstance(document, str) else document.tobytes()
        digest = hashlib.blake2b(content, digest_size=8).digest()
        return (int.from_bytes(digest, "big") < self.of_all * 2**64) == self.validates


@dataclass(frozen=True)
class DocumentFile(abc.ABC):
    """Random access to the documents of row group i.

    Empty ones are left out, and those outside `share`. Keeps its path, not an open file, so that
    worker processes can have it. Raises DataError that names file and place when it is damaged.
    """

    path: Path
    share: Share | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @abc.abstractmethod
    def __len__(self) -> int:
        """Row groups."""

    @abc.abstractmethod
    def size(self) -> int:
        """Bytes of all of them, unpacked."""

    @abc.abstractmethod
    def _read(self, group: int) -> list[Any]: ...

    @abc.abstractmethod
    def _check_format(self) -> None: ...

    @abc.abstractmethod
    def _describe(self) -> dict[str, Any]: ...

    def __getitem__(self, group: int) -> list[Any]:
        """Its documents: all of the file are texts, or all are tokens."""
        return [each for each in self._read(group) if self.share is None or each in self.share]

    def check(self) -> None:
        """Raise DataError unless the file is whole."""
        self._check_format()

    def has_documents(self) -> bool:
        """Whether any document falls into its share."""
        return any(self[group] for group in range(len(self)))

    def describe(self) -> dict[str, Any]:
        """What two files of the same text share, ready for JSON."""
        if self.share is None:
            return self._describe()
        part = self.share.of_all if self.share.validates else 1 - self.share.of_all
        return {**self._describe(), "share": part}


class ParquetFile(DocumentFile):
    """A string column `text`.

    A row group is the file's own, or of a large one a part: some writers make one of a whole file.
    """

    @functools.cached_property
    def _groups(self) -> tuple[tuple[int, range], ...]:
        """Of each: the file's row group, and which of its rows."""
        metadata, found = pq.read_metadata(self.path), []
        for group in range(metadata.num_row_groups):
            own = metadata.row_group(group)
            parts = max(min(-(-own.total_byte_size // _PART), own.num_rows), 1)
            ends = [own.num_rows * part // parts for part in range(parts + 1)]
            found += [(group, range(*rows)) for rows in itertools.pairwise(ends)]
        return tuple(found)

    def __len__(self) -> int:
        return len(self._groups)

    def size(self) -> int:
        found = pq.read_metadata(self.path)
        return sum(found.row_group(i).total_byte_size for i in range(found.num_row_groups))

    def _read(self, group: int) -> list[str]:
        own, rows = self._groups[group]
        try:
            texts = _reader(self.path, own, rows.start).read(rows)
        except _UNREADABLE as error:
            _leave()
            raise DataError(
                f"{self.path}: row group {own} is damaged ({reason_of(error)}); "
                "download the shard again"
            ) from error
        if all(following != own for following, _ in self._groups[group + 1 : group + 2]):
            _leave()  # it was the last part
        return texts

    def _check_format(self) -> None:
        path = self.path
        try:
            with _open(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
                if "text" not in schema.names:
                    raise DataError(
                        f"{path} has no column `text`, only {', '.join(schema.names)}; rename one"
                    )
                kind = schema.field("text").type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise DataError(
                        f"{path}: column `text` is of type {kind}, not string; convert it"
                    )
                if not rows:
                    raise DataError(f"{path} has no rows; remove it or download it again")
                groups = range(file.metadata.num_row_groups)
                if not any(any(texts.to_pylist()) for i in groups for texts in _texts(file, i)):
                    raise DataError(
                        f"{path}: column `text` is empty; remove it or download it again"
                    )
        except _UNREADABLE as error:
            raise DataError(f"{path} is damaged ({reason_of(error)}); download it again") from error

    def _describe(self) -> dict[str, Any]:
        # The footer holds every column chunk's place, size and, mostly, smallest and largest text.
        with self.path.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, os.SEEK_END)
            footer = file.read(length)
        metadata = pq.read_metadata(self.path)
        return {
            "name": self.path.name,
            "bytes": self.path.stat().st_size,
            "rows": metadata.num_rows,
            "row_groups": len(self),  # positions count them
            "footer_sha256": hashlib.sha256(footer).hexdigest()[:16],
        }


def _open(path: Path) -> pq.ParquetFile:
    """As a stream: by default the whole column of a row group is read before its first text."""
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)


def _texts(file: pq.ParquetFile, group: int) -> Iterator[pa.Array]:
    """Column `text` of a row group, a few rows at once; less than a part of a large one."""
    own = file.metadata.row_group(group)
    fit = own.num_rows * _PART // max(own.total_byte_size, 1)
    size = max(min(_READ_AT_ONCE, fit), 1)
    return (each["text"] for each in file.iter_batches(size, row_groups=[group], columns=["text"]))


class _Reader:
    """Reads a row group from front to back; what is passed over is decoded, and not kept.

    row: the first that it has not passed
    """

    def __init__(self, path: Path, group: int):
        self.path, self.group, self.row = path, group, 0
        self._file = _open(path)
        self._batches, self._ahead = _texts(self._file, group), pa.array([], pa.string())

    def read(self, rows: range) -> list[str]:
        """The documents of `rows`, which begin at `row` or after it; empty ones are left out."""
        found: list[str] = []
        while self.row < rows.stop and self._any_ahead():
            end = rows.start if self.row < rows.start else rows.stop
            texts = self._ahead[: end - self.row]
            if self.row >= rows.start:
                found += filter(None, texts.to_pylist())
            self._ahead = self._ahead[len(texts) :]
            self.row += len(texts)
        return found

    def close(self) -> None:
        self._file.close()

    def _any_ahead(self) -> bool:
        if not len(self._ahead):
            self._ahead = next(self._batches, self._ahead)
        return len(self._ahead) > 0


_KEPT = threading.local()  # `reader`: the thread's own, of the row group that it is in


def _reader(path: Path, group: int, row: int) -> _Reader:
    """One that may go on to `row`: the thread's, where it has come no further yet, or a new one.

    Parts are mostly asked for in their order, and for each a new one would decode all before it.
    """
    kept = getattr(_KEPT, "reader", None)
    if kept is not None and (kept.path, kept.group) == (path, group) and kept.row <= row:
        return kept
    _leave()
    _KEPT.reader = _Reader(path, group)
    return _KEPT.reader


def _leave() -> None:
    """Close the thread's reader."""
    if (kept := getattr(_KEPT, "reader", None)) is not None:
        kept.close()
    _KEPT.reader = None


def reason_of(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
