"""The training tokens of a corpus as one long array, any stretch of which is read at once.

Token files are mapped as they lie. Text is tokenized once, into a file of the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from looped_jax import files
from looped_jax.data.corpus import Corpus, RowGroups
from looped_jax.data.packing.base import Encoder
from looped_jax.data.pipeline import encoder_of
from looped_jax.data.token_files import TokenFile
from looped_jax.data.tokenizer import Tokenizer
from looped_jax.errors import DataError


class TokenStream:
    """Arrays of ids, one behind the other; `len` is how many ids they hold in all."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids start … start + count − 1, int32 [count]."""
        found: list[np.ndarray] = []
        which = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            place = start - int(self._ends[which]) + len(self._parts[which])
            piece = self._parts[which][place : place + count].astype(np.int32)
            found.append(piece)
            start, count, which = start + len(piece), count - len(piece), which + 1
        return np.concatenate(found)


def open_stream(corpus: Corpus, tokenizer: Tokenizer | None) -> TokenStream:
    """The training tokens of `corpus`, in the order of its files. Raises DataError."""
    encoder = encoder_of(corpus, tokenizer)
    of_tokens = [file for file in corpus.train if isinstance(file, TokenFile)]
    if of_tokens and of_tokens[0].share is None:
        return TokenStream([file.ids for file in of_tokens])
    known = [corpus.fingerprint()["train"], tokenizer.fingerprint() if tokenizer else None]
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    dtype = "<u4" if tokenizer and tokenizer.vocab_size > 1 << 16 else "<u2"
    dtype = of_tokens[0].format.dtype if of_tokens else dtype
    path = files.default_cache_dir() / "tokens" / name / "tokens.bin"
    if not path.is_file():
        print(f"writing the tokens of the training text to {path.parent} (once) ...", flush=True)
        with files.new_folder(path.parent) as part:
            _write(part / path.name, corpus, encoder, dtype)
    return TokenStream([np.memmap(path, dtype, "r")])


def _write(path: Path, corpus: Corpus, encoder: Encoder, dtype: str) -> None:
    groups = RowGroups(corpus.train)
    with path.open("wb") as file:
        for i in range(len(groups)):
            for ids in encoder.encode_documents(groups[i]):
                file.write(ids.astype(dtype).tobytes())
        if not file.tell():
            raise DataError("data.path: all row groups to train on are empty; add text")
