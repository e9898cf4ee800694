"""Rows that begin with a document, filled with whole ones that fit: `data.packing=best_fit`.

A row of T + 1 tokens takes the longest document at hand that still fits (of equals the first),
until none does; then the beginning of the shortest one fills it, whose rest is dropped or comes
back. So every row begins with a start token, and at most its last document is cut. Rows share no
token. At hand are `buffer` documents or more: before each choice a row group's next `refill`
documents are added, fewer at its end.

Where the rest is dropped, documents longer than a row pile up, since only the shortest is ever cut:
the share of tokens that are dropped grows while training goes on. It is logged.

Source: nanochat (Karpathy, 2025), dataloader.py: tokenizing_distributed_data_loader_bos_bestfit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import grain
import numpy as np

from looped_jax.config.options import at_least, one_of
from looped_jax.config.registry import PACKINGS
from looped_jax.data.packing.base import Encoder, Packing, nothing_to_read, read_ahead

RECENT = 1_000  # documents taken, over about so many the recent share is averaged


@dataclass(frozen=True)
class BestFitSettings:
    """What is at hand, and what becomes of the rest of a document."""

    buffer: int = at_least(1, 1_000, "documents to choose from, at least")
    refill: int = at_least(1, 128, "documents added at once, of one row group")
    remainder: str = one_of(
        ("drop", "requeue"), "drop", "of a document that is cut; requeue: comes back as another"
    )


@PACKINGS.register("best_fit")
class BestFit(Packing):
    """Rows that begin with a document, filled with whole ones that fit."""

    Settings = BestFitSettings
    shares_files: ClassVar[bool] = True
    needs_starts: ClassVar[bool] = True

    def __init__(self, settings: BestFitSettings | None = None):
        super().__init__(settings or BestFitSettings())

    def rows(
        self,
        documents: grain.MapDataset,
        encoder: Encoder,
        *,
        seq_len: int,
        workers: int,
        shuffle_seed: int | None = None,
    ) -> BestFitRows:
        """A seed has shuffled the documents already."""
        return BestFitRows(documents, encoder, self.settings, seq_len=seq_len, workers=workers)

    def metrics(self, position: dict[str, Any]) -> dict[str, float]:
        """Shares of the tokens taken from the buffer that were dropped: of all, and of late."""
        kept, dropped = position["kept"], position["dropped"]
        late_kept, late_dropped = position["recent"]
        return {
            "data/dropped_share": dropped / max(kept + dropped, 1),
            "data/dropped_share_recent": late_dropped / max(late_kept + late_dropped, 1),
        }


class Tokens:
    """Texts to (tokens int32 [n], ends int64 [documents]); sent to worker processes."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        documents = self.encoder.encode_documents(texts)
        lengths = np.array([len(document) for document in documents], np.int64)
        return np.concatenate([np.zeros(0, np.int32), *documents]), lengths.cumsum()


class BestFitRows(grain.IterDataset):
    """Endless rows int32 [T + 1] of `documents`, whose element i is the texts of row group i."""

    def __init__(
        self,
        documents: grain.MapDataset,
        encoder: Encoder,
        settings: BestFitSettings,
        *,
        seq_len: int,
        workers: int,
    ):
        super().__init__()
        self.documents, self.encoder, self.settings = documents, encoder, settings
        self.capacity, self.workers = seq_len + 1, workers

    def __iter__(self) -> BestFitIterator:
        return BestFitIterator(self)

    def groups_from(self, start: int) -> grain.DatasetIterator:
        """Iterator over tokens of groups start, start + 1, … counted through all epochs."""
        tokens = self.documents.map(Tokens(self.encoder))
        return read_ahead(tokens, start, workers=self.workers)

    def again(self, groups: np.ndarray, documents: np.ndarray) -> list[np.ndarray]:
        """Tokens of document `documents[i]` of group `groups[i]`, each group read once."""
        found: dict[tuple[int, int], np.ndarray] = {}
        endless = self.documents.repeat()
        for group in np.unique(groups).tolist():
            wanted = np.unique(documents[groups == group]).tolist()
            texts = endless[group]
            tokens = self.encoder.encode_documents([texts[i] for i in wanted])
            found |= {(group, i): each for i, each in zip(wanted, tokens, strict=True)}
        return [found[place] for place in zip(groups.tolist(), documents.tolist(), strict=True)]


class BestFitIterator(grain.DatasetIterator):
    """Its state is JSON and says which documents are at hand, not what is in them.

    Setting it reads their row groups again, and tokenizes these documents alone. A document of n
    tokens is at hand from token `start` on, behind its start token: as a whole from 1, and where it
    comes back from where it was cut.
    """

    def __init__(self, rows: BestFitRows):
        super().__init__()
        self._rows = rows
        self._source: grain.DatasetIterator | None = None
        self._state: dict[str, Any] | None = _start()  # set, and not yet read again

    # ---- documents at hand, in the order in which they came ----

    def _read_again(self, state: dict[str, Any]) -> None:
        """Bring to hand what a state names."""
        self._group, self._read = state["group"], state["read"]
        self._kept, self._dropped = state["kept"], state["dropped"]
        self._recent = np.array(state["recent"])
        columns = [np.array(state[name], np.int64) for name in ("groups", "documents", "starts")]
        self._at_hand = np.stack(columns, axis=1)
        self._tokens = self._rows.again(*columns[:2])
        self._lengths = np.array([len(t) for t in self._tokens], np.int64) + 1 - columns[2]
        self._source = self._rows.groups_from(self._group)
        self._texts = next(self._source)
        self._empty = 0  # groups without a document, one after another
        self._state = None

    def _refill(self) -> None:
        """Add the next documents, of one row group, until there are enough."""
        settings = self._rows.settings
        while len(self._tokens) < settings.buffer:
            tokens, ends = self._texts
            first, last = self._read, min(self._read + settings.refill, len(ends))
            if first == last:
                self._next_group()
                continue
            starts = np.concatenate([[0], ends])[first:last]
            places = zip(starts, ends[first:last], strict=True)
            self._tokens += [tokens[a:b].copy() for a, b in places]  # a view would keep the group
            self._lengths = np.concatenate([self._lengths, ends[first:last] - starts])
            new = [(self._group, document, 1) for document in range(first, last)]
            self._at_hand = np.concatenate([self._at_hand, np.array(new, np.int64)])
            self._read, self._empty = last, 0

    def _next_group(self) -> None:
        self._empty = 0 if len(self._texts[1]) else self._empty + 1
        if self._empty == len(self._rows.documents):
            raise nothing_to_read(self._empty)
        assert self._source is not None
        self._texts = next(self._source)
        self._group, self._read = self._group + 1, 0

    def _take(self, which: int, most: int) -> np.ndarray:
        """Up to `most` tokens of one of the documents, which is then no longer at hand."""
        tokens, length = self._tokens.pop(which), int(self._lengths[which])
        group, document, start = self._at_hand[which].tolist()
        self._lengths = np.delete(self._lengths, which)
        self._at_hand = np.delete(self._at_hand, which, axis=0)
        kept, rest = min(length, most), length - min(length, most)
        if rest and self._rows.settings.remainder == "requeue":
            again = start + kept - 1
            self._tokens.append(tokens)
            self._lengths = np.append(self._lengths, 1 + rest)
            self._at_hand = np.concatenate([self._at_hand, [[group, document, again]]])
            rest = 0
        self._kept, self._dropped = self._kept + kept, self._dropped + rest
        self._recent = self._recent * (1 - 1 / RECENT) + (kept, rest)
        return np.concatenate([tokens[:1], tokens[start : start + kept - 1]])

    def __next__(self) -> np.ndarray:
        if self._state is not None:
            self._read_again(self._state)
        row: list[np.ndarray] = []
        space = self._rows.capacity
        while space:
            self._refill()
            fitting = np.where(self._lengths <= space, self._lengths, 0)
            which = int(fitting.argmax())  # the first of equals, as argmin below
            if not fitting[which]:
                which = int(self._lengths.argmin())
            row.append(self._take(which, space))
            space -= len(row[-1])
        return np.concatenate(row)

    def get_state(self) -> dict[str, Any]:
        if self._state is not None:
            return self._state
        groups, documents, starts = self._at_hand.T.tolist()
        return {
            "group": self._group, "read": self._read,
            "groups": groups, "documents": documents, "starts": starts,
            "kept": self._kept, "dropped": self._dropped, "recent": self._recent.tolist(),
        }  # fmt: skip

    def set_state(self, state: dict[str, Any]) -> None:
        self._state = state
        self._close_source()

    def close(self) -> None:
        super().close()
        self._close_source()

    def _close_source(self) -> None:
        if self._source is not None:
            self._source.close()
        self._source = None


def _start() -> dict[str, Any]:
    lists: dict[str, Any] = {"groups": [], "documents": [], "starts": []}
    return {"group": 0, "read": 0, **lists, "kept": 0, "dropped": 0, "recent": [0.0, 0.0]}
