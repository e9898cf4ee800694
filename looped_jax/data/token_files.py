"""Files of token ids: shards with a header, as llm.c and modded-nanogpt write them, and nanoGPT's.

A shard begins with 256 little-endian int32: a magic number, a version, and how many tokens follow.
nanoGPT's train.bin and val.bin are uint16 from the first byte on. Ids are read where they lie, a
row group at a time; a file is read through once, before anything else, and what was seen is kept in
the cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from looped_jax import files
from looped_jax.config.options import either
from looped_jax.data.document_files import DocumentFile
from looped_jax.errors import DataError

GROUP = 1 << 15  # tokens of a row group, about
_HEADER = 256  # int32
_WITHOUT_HEADER = ("train.bin", "val.bin")  # as nanoGPT names them
_BLOCK = 1 << 22  # tokens read at once


class Format(NamedTuple):
    """What the ids of a file are: how they are written, and what is known of them."""

    dtype: str
    vocab_size: int
    document_start: int | None  # the id that every document begins with


_GPT2 = Format("<u2", 50_257, 50_256)
_BYTES = Format("u1", 256, None)
_LLAMA_3 = Format("<u4", 128_256, 128_000)
# By magic number and version; which of several is told by the bytes that the tokens take.
_SHARDS = {(20240520, 1): (_GPT2, _BYTES), (20240801, 7): (_LLAMA_3,)}


class Layout(NamedTuple):
    """Where the ids of a file are."""

    format: Format
    offset: int  # in bytes
    tokens: int


def layout_of(path: Path) -> Layout:
    """Where the ids of a token file are, from its header. Raises DataError for what is wrong."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", _HEADER)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    if path.name in _WITHOUT_HEADER and not _is_header(header, size):
        if not size or size % 2:
            raise DataError(f"{path} has {size} bytes, which are no uint16 tokens; write it again")
        return Layout(_GPT2._replace(document_start=None), 0, size // 2)
    if size < 4 * _HEADER:
        raise DataError(
            f"{path} has {size} bytes, less than a shard's header of {4 * _HEADER}; get it again"
        )
    magic, version, count = map(int, header[:3])
    if magic not in (known := {m: v for m, v in _SHARDS}):
        raise DataError(
            f"{path} begins with {magic}, the magic number of no token shard ({either([*known])}); "
            f"get it again; without a header it has to be named {either(_WITHOUT_HEADER)}"
        )
    if version != known[magic]:
        raise DataError(
            f"{path} is of version {version}, and {known[magic]} alone is known; write it anew"
        )
    payload = size - 4 * _HEADER
    if count < 1:
        raise DataError(f"{path} holds {count} tokens by its header; get it again")
    for found in _SHARDS[magic, version]:
        if payload == count * np.dtype(found.dtype).itemsize:
            return Layout(found, 4 * _HEADER, count)
    sizes = [count * np.dtype(each.dtype).itemsize for each in _SHARDS[magic, version]]
    raise DataError(
        f"{path} holds {count} tokens by its header, which are {either(sizes)} bytes, but "
        f"{payload} follow it; get it again"
    )


def _is_header(header: np.ndarray, size: int) -> bool:
    """Whether a file begins as a shard does, if perhaps with another magic number or version."""
    if len(header) < _HEADER:
        return False
    sizes = {4 * _HEADER + int(header[2]) * width for width in (1, 2, 4)}
    return int(header[0]) in {magic for magic, _ in _SHARDS} or (
        size in sizes and not header[3:].any()
    )


def looks_like_tokens(path: Path) -> bool:
    """Whether a .bin file, which may hold anything, says that it holds tokens."""
    if path.name in _WITHOUT_HEADER:
        return True
    try:
        return _is_header(np.fromfile(path, "<i4", _HEADER), path.stat().st_size)
    except OSError:
        return False


@dataclass(frozen=True)
class TokenFile(DocumentFile):
    """Documents of ids, int32, as they stand in the file; of each the first id is its start token.

    Where the file does not begin with the start token of its format nobody knows where documents
    begin, and what comes instead are runs of GROUP ids.
    """

    def __len__(self) -> int:
        return -(-self._layout.tokens // GROUP)

    def size(self) -> int:
        return self._layout.tokens * np.dtype(self._layout.format.dtype).itemsize

    @property
    def format(self) -> Format:
        return self._layout.format

    @functools.cached_property
    def document_start(self) -> int | None:
        """The id that documents begin with, where they are known."""
        start = self.format.document_start
        return start if start is not None and int(self.ids[0]) == start else None

    @functools.cached_property
    def largest(self) -> int:
        """The largest id."""
        return self._seen["largest"]

    def check_ids(self, vocab_size: int, start: Sequence[int] | None = None) -> None:
        """Raise DataError for an id that a vocabulary of so many entries does not hold.

        Or for documents that begin otherwise than with `start`, their tokenizer's.
        """
        if start is not None and self.document_start not in (None, *start):
            raise DataError(
                f"{self.path}: its documents begin with {self.document_start}, and those of "
                f"the tokenizer with {', '.join(map(str, start)) or 'nothing'}; give the one that "
                "it was written with, as data.tokenizer"
            )
        if self.largest < vocab_size:
            return
        place = next(
            start + int(np.argmax(block >= vocab_size))
            for start, block in self._blocks()
            if (block >= vocab_size).any()
        )
        raise DataError(
            f"{self.path}: token {place} is {int(self.ids[place])}, and the vocabulary has "
            f"{vocab_size} entries; give the tokenizer that it was written with, as data.tokenizer"
        )

    def _read(self, group: int) -> list[np.ndarray]:
        start, end = self._begin(group), self._begin(group + 1)
        ids = np.array(self.ids[start:end], np.int32)
        if self.document_start is None:
            return [ids]
        cuts = np.flatnonzero(ids == self.document_start)
        return [each for each in np.split(ids, cuts) if len(each)]

    def _begin(self, group: int) -> int:
        """Where a row group begins: at the first document of its GROUP ids, or of later ones."""
        place = group * GROUP
        if self.document_start is None or group == 0:
            return min(place, self._layout.tokens)
        while place < self._layout.tokens:
            found = np.flatnonzero(self.ids[place : place + GROUP] == self.document_start)
            if len(found):
                return place + int(found[0])
            place += GROUP
        return self._layout.tokens

    def _check_format(self) -> None:
        assert self._seen

    def _describe(self) -> dict[str, Any]:
        return {
            "name": self.path.name,
            "tokens": self._layout.tokens,
            "row_groups": len(self),
            "sha256": self._seen["sha256"][:16],
        }

    @functools.cached_property
    def _layout(self) -> Layout:
        return layout_of(self.path)

    @property
    def ids(self) -> np.ndarray:
        """All of them, mapped from the disk and not read."""
        dtype, (_, offset, tokens) = self.format.dtype, self._layout
        try:
            return np.memmap(self.path, dtype, "r", offset=offset, shape=(tokens,))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} has changed while it was in use; start anew") from error

    def _blocks(self) -> Any:
        """(place, ids) of one block after the other."""
        ids = self.ids
        for start in range(0, len(ids), _BLOCK):
            yield start, ids[start : start + _BLOCK]

    @functools.cached_property
    def _seen(self) -> dict[str, Any]:
        """Largest id and SHA-256 of all ids; from the cache when the file is as it was."""
        state, layout = self.path.stat(), self._layout
        known = f"{self.path.resolve()} {state.st_size} {state.st_mtime_ns} {layout}"
        name = hashlib.sha256(known.encode()).hexdigest()[:16]
        cached = files.default_cache_dir() / "token_files" / f"{name}.json"
        if cached.is_file():
            return json.loads(cached.read_text("utf-8"))
        largest, digest = 0, hashlib.sha256()
        for _, block in self._blocks():
            largest = max(largest, int(block.max()))
            digest.update(block)
        seen = {"largest": largest, "sha256": digest.hexdigest()}
        with contextlib.suppress(OSError):  # without a cache it is read through each time
            files.write_json(cached, seen)
        return seen
