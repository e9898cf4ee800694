"""Rows that begin anywhere: `data.order=random`, nanoGPT's batches.

Every row begins at a token drawn from the whole training text, with replacement: no epochs, and
some tokens come often while others have not come yet. Row r of a run follows from the seed and r
alone, whichever process and device it falls to, so a position is the number of rows so far.

Source: nanoGPT (Karpathy, 2022), train.py: get_batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from looped_jax.config.settings import DataConfig
from looped_jax.data.corpus import Corpus
from looped_jax.data.token_stream import TokenStream, open_stream
from looped_jax.data.tokenizer import Tokenizer
from looped_jax.errors import ConfigError, DataError


class RandomOrder:
    """As Epochs, the other order of rows: see data/epochs.py."""

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer | None, data: DataConfig, *, seq_len: int
    ):
        if data.packing != "stream":
            raise ConfigError(
                f"data.order=random draws rows from one stream, and data.packing={data.packing} "
                "fills them otherwise; leave one of them out"
            )
        self._corpus, self._tokenizer, self._seq_len = corpus, tokenizer, seq_len
        self._seed = data.shuffle_seed or 0

    @functools.cached_property
    def _stream(self) -> TokenStream:
        return open_stream(self._corpus, self._tokenizer)

    def rows(
        self, *, batch_size: int, index: int, count: int, workers: int = 0, prefetch: int = 2
    ) -> grain.IterDataset:
        """Batches int32 [batch_size, T + 1]; nothing is left to tokenize for `workers`.

        Raises DataError when the text does not fill a row.
        """
        rows = RandomRows(
            self._stream, seq_len=self._seq_len, seed=self._seed, index=index, count=count
        )
        batches = rows.batch(batch_size)
        return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)

    def remap_positions(
        self, positions: Sequence[dict[str, Any]], *, index: int, count: int
    ) -> dict[str, Any]:
        """With the very next row: a step is as many rows, however many processes read them."""
        return {"rows": sum(position["rows"] for position in positions) // count}

    def epochs(self, position: dict[str, Any], *, index: int, count: int) -> float:
        """Tokens drawn so far by all processes, in lengths of the training text."""
        return position["rows"] * count * self._seq_len / len(self._stream)

    def metrics(self, position: dict[str, Any]) -> dict[str, float]:
        return {}

    def fingerprint(self) -> dict[str, Any]:
        return {"order": "random", "shuffle_seed": self._seed}


class RandomRows(grain.IterDataset):
    """Endless rows int32 [T + 1]: process `index` of `count` has rows index, index + count, … ."""

    def __init__(
        self, stream: TokenStream, *, seq_len: int, seed: int, index: int = 0, count: int = 1
    ):
        super().__init__()
        if len(stream) <= seq_len:
            raise DataError(
                f"data.path: {len(stream)} tokens to train on are too few for one row of "
                f"model.seq_len={seq_len}; add text, or lower it"
            )
        self.stream, self.seq_len, self.seed = stream, seq_len, seed
        self.index, self.count = index, count

    def __iter__(self) -> RandomRowsIterator:
        return RandomRowsIterator(self)

    def row(self, number: int) -> np.ndarray:
        """Row `number` of the run, from 0."""
        philox = np.random.Philox(key=self.seed, counter=(0, number, 0, 0))
        start = np.random.Generator(philox).integers(len(self.stream) - self.seq_len)
        return self.stream.read(int(start), self.seq_len + 1)


class RandomRowsIterator(grain.DatasetIterator):
    """Its state is how many rows its process has had."""

    def __init__(self, rows: RandomRows):
        super().__init__()
        self._rows, self._had = rows, 0

    def __next__(self) -> np.ndarray:
        row = self._rows.row(self._had * self._rows.count + self._rows.index)
        self._had += 1
        return row

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._had}

    def set_state(self, state: dict[str, Any]) -> None:
        self._had = state["rows"]
