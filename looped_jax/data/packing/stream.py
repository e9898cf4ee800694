"""Rows cut from one endless stream of tokens, without losing one: `data.packing=stream`.

Neighbouring rows share one token: row r is tokens r·T to r·T + T of the endless stream, so every
token is predicted exactly once. A position is three small things: the index of the row group being
read, the place in it, and the up to T tokens that earlier groups left over. With a seed the rows of
each group come in an order of their own, which follows from the seed and the group's index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from looped_jax.config.registry import PACKINGS
from looped_jax.data.packing.base import Encoder, Packing, nothing_to_read, read_ahead


@PACKINGS.register("stream")
class Stream(Packing):
    """One token after the other; every token is predicted once in an epoch."""

    def rows(
        self,
        documents: grain.MapDataset,
        encoder: Encoder,
        *,
        seq_len: int,
        workers: int,
        shuffle_seed: int | None = None,
    ) -> PackedRows:
        """With a seed the rows of a row group are shuffled, too.

        A batch of rows in a line holds a handful of documents, and its gradient is theirs, not the
        corpus's.
        """
        tokens = documents.map(Tokens(encoder))
        return PackedRows(tokens, seq_len=seq_len, workers=workers, shuffle_seed=shuffle_seed)

    def remap_positions(
        self, positions: Sequence[dict[str, Any]], files: Sequence[int], *, index: int, count: int
    ) -> dict[str, Any]:
        """At the first of its own row groups that they had not all finished.

        Up to a row group per process is read twice, none is skipped.
        """

        def place(process: int, group: int) -> tuple[int, int]:
            own = self.share(files, index=process, count=len(positions))
            epoch, within = divmod(group, own)
            return epoch, within * len(positions) + process

        epoch, first = min(place(process, p["group"]) for process, p in enumerate(positions))
        within = len(range(index, first, count))  # own groups before the first unfinished one
        first_own = epoch * self.share(files, index=index, count=count)
        return {"group": first_own + within, "cursor": 0, "head": []}

    def fingerprint(self) -> dict[str, Any]:
        """Nothing: what every run had before there was another packing."""
        return {}


_ENCODED_AT_ONCE = 256  # documents


class Tokens:
    """Texts to one int32 array, each document behind its start token; sent to worker processes."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, texts: list[str]) -> np.ndarray:
        tokens = bytearray()  # grows where it is: arrays to be joined would take as much again
        for first in range(0, len(texts), _ENCODED_AT_ONCE):
            for document in self.encoder.encode_documents(texts[first : first + _ENCODED_AT_ONCE]):
                tokens += document.tobytes()
        return np.frombuffer(tokens, np.int32)


class PackedRows(grain.IterDataset):
    """Endless rows int32 [T + 1] of `groups`, whose element i is row group i as one token array.

    Groups are read and tokenized ahead in `workers` processes (0: a thread). They come back in
    order, and packing happens after them: the rows do not depend on the number of workers.
    `shuffle_seed` shuffles the rows of each group. Raises DataError after an epoch without a token.
    """

    def __init__(
        self,
        groups: grain.MapDataset,
        *,
        seq_len: int,
        workers: int,
        shuffle_seed: int | None = None,
    ):
        super().__init__()
        self.groups, self.seq_len, self.workers = groups, seq_len, workers
        self.shuffle_seed = shuffle_seed

    def __iter__(self) -> PackedRowsIterator:
        return PackedRowsIterator(self)

    def groups_from(self, start: int) -> grain.DatasetIterator:
        """Iterator over groups start, start + 1, … counted through all epochs."""
        return read_ahead(self.groups, start, workers=self.workers)

    def order(self, count: int, group: int) -> np.ndarray:
        """Which of the `count` rows that end in `group`, counted through all epochs, come first."""
        if self.shuffle_seed is None:
            return np.arange(count)
        return np.random.default_rng([self.shuffle_seed, group]).permutation(count)


class PackedRowsIterator(grain.DatasetIterator):
    """Its state is JSON; setting it reads one row group again and continues with the next row."""

    def __init__(self, rows: PackedRows):
        super().__init__()
        self._rows = rows
        self._source: grain.DatasetIterator | None = None
        self._buffer: np.ndarray | None = None  # left-over tokens, then the current group's
        self._order = np.arange(0)  # of the buffer's rows
        self._head = np.zeros(0, np.int32)
        self._group = self._cursor = 0
        self._empty = 0  # groups without a token, one after another

    def __next__(self) -> np.ndarray:
        seq_len = self._rows.seq_len
        buffer = self._load(self._head) if self._buffer is None else self._buffer
        while self._cursor == len(self._order) * seq_len:
            self._head = buffer[self._cursor :].copy()
            self._buffer = None
            del buffer  # before there is another: a group may be a large file
            self._group, self._cursor = self._group + 1, 0
            buffer = self._load(self._head)
        first = self._order[self._cursor // seq_len] * seq_len
        self._cursor += seq_len
        return buffer[first : first + seq_len + 1]

    def _load(self, head: np.ndarray) -> np.ndarray:
        """Put the next group's tokens behind what is left over."""
        if self._source is None:
            self._source = self._rows.groups_from(self._group)
        tokens = next(self._source)
        self._empty = 0 if len(tokens) else self._empty + 1
        if self._empty == len(self._rows.groups):
            raise nothing_to_read(self._empty)
        self._head = head
        self._buffer = np.concatenate([head, tokens]) if len(head) else tokens
        rows = max(len(self._buffer) - 1, 0) // self._rows.seq_len
        self._order = self._rows.order(rows, self._group)
        return self._buffer

    def get_state(self) -> dict[str, Any]:
        return {"group": self._group, "cursor": self._cursor, "head": self._head.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._group, self._cursor = state["group"], state["cursor"]
        self._head = np.array(state["head"], np.int32)
        self._buffer, self._empty = None, 0
        self._close_source()

    def close(self) -> None:
        super().close()
        self._close_source()

    def _close_source(self) -> None:
        if self._source is not None:
            self._source.close()
        self._source = None
