"""Plain text and JSON lines, read by byte offsets.

A row group is about 128 KiB of whole documents. Where these begin is found by reading the file once
from front to back, which also checks every byte of it; the places are kept in the cache, so that a
file of any size is opened at once the next time and never held in memory.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from looped_jax import files
from looped_jax.data.document_files import DocumentFile, reason_of
from looped_jax.errors import DataError

# Of a .txt file, in characters: a document ends at the first blank line after DOCUMENT of them, or,
# when there is none before LONGEST, at the last line end before or, at worst, right there.
DOCUMENT, LONGEST = 2_000, 20_000
GROUP = 128 << 10  # bytes of a row group of a .txt or .jsonl file, at least
_SEARCHED = 128 << 10  # bytes after these that are searched for a good place to end a .txt group
_BLOCK = 8 << 20  # bytes read at once while places are looked for
_RECIPE = 1  # raise when files are cut differently, so that no stale index is used
_BLANK_LINE = r"\n[ \t\r]*\n"
_MARKER_LINE = r"^<\|endoftext\|>[ \t\r]*$\n?"  # as TinyStories and GPT-2's data end documents
_GROUP_ENDS = tuple(re.compile(p.encode(), re.MULTILINE) for p in (_MARKER_LINE, _BLANK_LINE))


@dataclass(frozen=True)
class Index:
    """Where the row groups of a file begin, and what was seen on the way there."""

    offsets: np.ndarray  # int64 [groups + 1], in bytes; the last is the file's length
    lines: np.ndarray  # int64 [groups], numbers of their first lines, from 1
    documents: int
    sha256: str  # of the whole file


class IndexedFile(DocumentFile):
    """A file of UTF-8 whose row groups are found by reading it once."""

    @abc.abstractmethod
    def _end(self, data: bytes, start: int, *, final: bool) -> int | None:
        """Where the row group that begins at `start` ends; None when more data has to be seen."""

    @abc.abstractmethod
    def _documents(self, text: str, line: int) -> list[str]:
        """Documents of a row group whose first line is number `line` of the file."""

    def __len__(self) -> int:
        return len(self._index.lines)

    def size(self) -> int:
        return int(self._index.offsets[-1])

    def _read(self, group: int) -> list[str]:
        start, end = map(int, self._index.offsets[group : group + 2])
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != self.size():
                    raise DataError(f"{self.path} has changed while it was in use; start anew")
                file.seek(start)
                data = file.read(end - start)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror})") from error
        return self._parsed(data, start, int(self._index.lines[group]))

    def _parsed(self, data: bytes, start: int, line: int) -> list[str]:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line += data.count(b"\n", 0, error.start)
            raise DataError(
                f"{self.path}, line {line}: byte 0x{data[error.start]:02x} is no UTF-8; convert "
                "the file, as with iconv -f LATIN1 -t UTF-8, or mend that line"
            ) from error
        if start == 0:
            text = text.removeprefix("\ufeff")  # which some editors write in front
        return self._documents(text, line)

    def _check_format(self) -> None:
        if not self._index.documents:
            raise DataError(f"{self.path} holds no text; give another file")

    def _describe(self) -> dict[str, Any]:
        return {
            "name": self.path.name,
            "bytes": self.size(),
            "documents": self._index.documents,
            "row_groups": len(self),
            "sha256": self._index.sha256[:16],
        }

    @functools.cached_property
    def _index(self) -> Index:
        """From the cache when the file is as it was. Raises DataError for damage anywhere in it."""
        try:
            state = self.path.stat()
            known = f"{_RECIPE} {self.path.resolve()} {state.st_size} {state.st_mtime_ns}"
            name = hashlib.sha256(known.encode()).hexdigest()[:16]
            cached = files.default_cache_dir() / "text_files" / f"{name}.npz"
            if cached.is_file():
                with np.load(cached) as found:
                    return Index(
                        found["offsets"], found["lines"], int(found["documents"]),
                        str(found["sha256"]),
                    )  # fmt: skip
            index = self._read_through()
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read ({error.strerror}); make it readable"
            ) from error
        buffer = io.BytesIO()
        np.savez(buffer, **vars(index))
        with contextlib.suppress(OSError):  # without a cache it is read through each time
            files.write_bytes(cached, buffer.getvalue())
        return index

    def _read_through(self) -> Index:
        offsets, lines, documents, digest = [0], [], 0, hashlib.sha256()
        line = 1
        for data in self._groups(digest.update):
            documents += len(self._parsed(data, offsets[-1], line))
            lines.append(line)
            offsets.append(offsets[-1] + len(data))
            line += data.count(b"\n")
        return Index(np.array(offsets), np.array(lines, np.int64), documents, digest.hexdigest())

    def _groups(self, seen: Callable[[bytes], Any]) -> Iterator[bytes]:
        """The bytes of one row group after the other; `seen` is called with all that is read."""
        rest, final = b"", False
        with self.path.open("rb") as file:
            while not final:
                block = file.read(_BLOCK)
                seen(block)
                data, start, final = rest + block, 0, not block
                while start < len(data):
                    end = self._end(data, start, final=final)
                    if end is None:
                        break
                    yield data[start:end]
                    start = end
                rest = data[start:]


class TextFile(IndexedFile):
    """Plain text, cut into documents at blank lines.

    A document has at least 2,000 characters, as those of the builtin corpus, unless a row group
    ends there or a line `<|endoftext|>` stands there, which is no part of any document.
    """

    def _end(self, data: bytes, start: int, *, final: bool) -> int | None:
        if len(data) - start <= GROUP + _SEARCHED and not final:
            return None
        low, high = start + GROUP, min(start + GROUP + _SEARCHED, len(data))
        if low >= high:
            return len(data)
        for pattern in _GROUP_ENDS:
            if found := pattern.search(data, low, high):
                return found.end()
        if (line := data.rfind(b"\n", low, high)) >= 0:
            return line + 1
        while high > low and high < len(data) and data[high] & 0xC0 == 0x80:
            high -= 1  # into the midst of a character
        return high

    def _documents(self, text: str, line: int) -> list[str]:
        pieces = re.split(_MARKER_LINE, text, flags=re.MULTILINE) if "<|endo" in text else [text]
        documents = [document for piece in pieces for document in _cut(piece)]
        return [document for document in documents if not document.isspace()]


def _cut(text: str) -> Iterator[str]:
    start, blank_line = 0, re.compile(_BLANK_LINE)
    while start < len(text):
        low, high = start + DOCUMENT, start + LONGEST
        if found := blank_line.search(text, low, high):
            end = found.end()
        elif len(text) <= high:
            end = len(text)
        else:
            end = text.rfind("\n", low, high) + 1 or high
        yield text[start:end]
        start = end


class JSONLinesFile(IndexedFile):
    """One JSON object a line, its field `text` a document."""

    def _end(self, data: bytes, start: int, *, final: bool) -> int | None:
        line_end = data.find(b"\n", start + GROUP - 1)
        return line_end + 1 or (len(data) if final else None)

    def _documents(self, text: str, line: int) -> list[str]:
        found = []
        for number, each in enumerate(text.split("\n"), line):
            if each and not each.isspace() and (document := self._text(each, number)):
                found.append(document)
        return found

    def _text(self, line: str, number: int) -> str | None:
        where = f"{self.path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where} is no JSON ({reason_of(error)}); mend or remove it"
            ) from error
        if not isinstance(entry, dict) or "text" not in entry:
            has = f"only {', '.join(entry)}" if isinstance(entry, dict) and entry else "nor another"
            raise DataError(f"{where} has no field `text`, {has}; rename one or remove the line")
        text = entry["text"]
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{where}: `text` is of type {type(text).__name__}, not string; mend it"
            )
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: `text` has half a character ({reason_of(error)}); mend it"
            ) from error
        return text
