"""Rows in epochs: `data.order=epochs`, each token of the training text once before any comes again.

A packing fills them, and `data.shuffle_seed` gives documents and rows another order in each epoch.
The other order is random_order.py's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import grain

from looped_jax.config.settings import DataConfig
from looped_jax.data import packing, pipeline
from looped_jax.data.corpus import Corpus
from looped_jax.data.tokenizer import Tokenizer


class Epochs:
    """The rows of a corpus for process `index` of `count`, from positions that are JSON."""

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer | None, data: DataConfig, *, seq_len: int
    ):
        self._corpus, self._tokenizer, self._seq_len = corpus, tokenizer, seq_len
        self._packing, self._shuffle_seed = packing.of(data), data.shuffle_seed

    @functools.cached_property
    def _groups(self) -> list[int]:
        """Groups of documents in an epoch, by file."""
        return pipeline.groups_by_file(self._corpus, shuffle_seed=self._shuffle_seed)

    def rows(
        self, *, batch_size: int, index: int, count: int, workers: int = 0, prefetch: int = 2
    ) -> grain.IterDataset:
        """Endless batches int32 [batch_size, T + 1], errors as in pipeline.train_rows."""
        return pipeline.train_rows(
            self._corpus,
            self._tokenizer,
            packing=self._packing,
            seq_len=self._seq_len,
            batch_size=batch_size,
            shard_index=index,
            shard_count=count,
            workers=workers,
            prefetch=prefetch,
            shuffle_seed=self._shuffle_seed,
        )

    def remap_positions(
        self, positions: Sequence[dict[str, Any]], *, index: int, count: int
    ) -> dict[str, Any]:
        """Where the process goes on after others that stood at `positions`."""
        return self._packing.remap_positions(positions, self._groups, index=index, count=count)

    def epochs(self, position: dict[str, Any], *, index: int, count: int) -> float:
        """How often the process has read its share of the text."""
        return self._packing.epochs(position, self._groups, index=index, count=count)

    def metrics(self, position: dict[str, Any]) -> dict[str, float]:
        """What is logged of every step, where its rows end at `position`."""
        return self._packing.metrics(position)

    def fingerprint(self) -> dict[str, Any]:
        """What two runs of the same rows share beside text and tokenizer, ready for JSON."""
        shuffled = {"shuffle_seed": self._shuffle_seed, "shuffled": "documents and rows"}
        return self._packing.fingerprint() | ({} if self._shuffle_seed is None else shuffled)
