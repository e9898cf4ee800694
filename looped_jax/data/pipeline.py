"""From files to batches: row groups of documents → tokens → packed rows → batches of rows.

Documents of token files are tokens already, and pass the second step as they are. Training rows are
endless and resumable; validation rows are a fixed list.
"""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np

from looped_jax.data.corpus import Corpus, RowGroups
from looped_jax.data.document_files import Document
from looped_jax.data.packing.base import Encoder, Packing
from looped_jax.data.packing.stream import Stream, Tokens
from looped_jax.data.tokenizer import Tokenizer
from looped_jax.errors import ConfigError, DataError

_SHUFFLED = 8 << 20  # bytes of text shuffled together; more mix better and start later
_ELEMENTS = 16  # such parts in an epoch, at least, where row groups allow it: processes share them


class AsTheyAre:
    """The encoder of documents that are tokens already."""

    def encode_documents(self, documents: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(documents)


def encoder_of(corpus: Corpus, tokenizer: Tokenizer | None) -> Encoder:
    """What makes tokens of the documents of `corpus`. Raises DataError for text without one."""
    if corpus.token_files:
        return AsTheyAre()
    if tokenizer is None:
        raise DataError(
            f"{corpus.val[0].path} is text, and no tokenizer is known that cuts it as the tokens "
            "that were trained on; give a token file"
        )
    return tokenizer


def check_packing(packing: Packing, corpus: Corpus, tokenizer: Tokenizer | None) -> None:
    """Raise ConfigError where `packing` has to know where documents begin, and nobody does."""
    if not packing.needs_starts:
        return
    unknown = next((file.path for file in corpus.token_files if file.document_start is None), None)
    if unknown or not (corpus.token_files or tokenizer is None or tokenizer.start):
        where = unknown or f"data.tokenizer of {tokenizer.vocab_size} entries"  # type: ignore
        raise ConfigError(
            f"data.packing={packing.name} has to know where documents begin, and {where} has no "
            "start token that tells; use data.packing=stream"
        )


def document_groups(corpus: Corpus, *, shuffle_seed: int | None = None) -> grain.MapDataset:
    """An epoch of training documents, a list for each row group, in the order of the files.

    With a seed in another order each epoch: row groups are drawn from the whole corpus, and the
    documents of as many as fill _SHUFFLED bytes are shuffled together and come as one element.
    Which they are follows from the seed and the element's number: no state is needed to go on.
    """
    groups = RowGroups(corpus.train)
    if shuffle_seed is None:
        return grain.MapDataset.source(groups)
    together = min(round(_SHUFFLED / max(groups.mean_size(), 1)), len(groups) // _ELEMENTS)
    shuffled = grain.MapDataset.source(groups).shuffle(shuffle_seed)
    return shuffled.batch(max(together, 1), batch_fn=_joined).random_map(
        _shuffled, seed=shuffle_seed
    )


def groups_by_file(corpus: Corpus, *, shuffle_seed: int | None = None) -> list[int]:
    """How many elements document_groups has of each file, or of all where they are shuffled."""
    if shuffle_seed is None:
        return [len(file) for file in corpus.train]
    return [len(document_groups(corpus, shuffle_seed=shuffle_seed))]


def _joined(groups: Sequence[list[Document]]) -> list[Document]:
    return [document for group in groups for document in group]


def _shuffled(documents: list[Document], random: np.random.Generator) -> list[Document]:
    return [documents[i] for i in random.permutation(len(documents))]


def train_rows(
    corpus: Corpus,
    tokenizer: Tokenizer | None,
    *,
    packing: Packing | None = None,
    seq_len: int,
    batch_size: int,
    shard_index: int = 0,
    shard_count: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    shuffle_seed: int | None = None,
) -> grain.IterDataset:
    """Endless batches int32 [batch_size, T + 1] of what document_groups gives, epoch after epoch.

    Each shard takes every shard_count-th row group, of each file where `packing` (by default one
    stream) shares files. `get_state()` of the iterator is the position of the next batch, as JSON.
    Raises DataError when there are too few row groups, and ConfigError for a packing that needs to
    know where documents begin where nobody does.
    """
    packing = packing or Stream()
    check_packing(packing, corpus, tokenizer)
    files = groups_by_file(corpus, shuffle_seed=shuffle_seed)
    if not packing.share(files, index=shard_count - 1, count=shard_count):
        most = (
            f"{max(files)} row groups a file"
            if packing.shares_files
            else f"{sum(files)} row groups"
        )
        raise DataError(
            f"data.path: the training text has {most} for {shard_count} processes; add text, write "
            "smaller row groups, or start fewer"
        )
    if packing.shares_files and shuffle_seed is None:
        own = RowGroups(corpus.train, every=shard_count, start=shard_index)
        documents = grain.MapDataset.source(own)
    else:
        groups = document_groups(corpus, shuffle_seed=shuffle_seed)
        documents = groups.slice(slice(shard_index, None, shard_count))
    rows = packing.rows(
        documents,
        encoder_of(corpus, tokenizer),
        seq_len=seq_len,
        workers=workers,
        shuffle_seed=shuffle_seed,
    )
    batches = rows.batch(batch_size)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)


def val_rows(
    corpus: Corpus,
    tokenizer: Tokenizer | None,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int,
    shard_index: int = 0,
    shard_count: int = 1,
) -> list[dict[str, np.ndarray]]:
    """Batches {inputs, targets} int32 [batch_size, T]: one pass over the text for validation.

    At most `max_tokens` targets, in whole rows, the same ones whatever the batch size and number
    of processes; every process gets as many batches, filled up with targets of −1. Raises
    DataError when `max_tokens` or the text does not fill one row.
    """
    if max_tokens < seq_len:
        raise DataError(
            f"{max_tokens} validation tokens are less than one row of model.seq_len={seq_len}; "
            "raise eval_tokens"
        )
    groups, tokenize = RowGroups(corpus.val), Tokens(encoder_of(corpus, tokenizer))
    pieces, have, wanted = [np.zeros(0, np.int32)], 0, max_tokens // seq_len * seq_len + 1
    for i in range(len(groups)):
        pieces.append(tokenize(groups[i]))
        have += len(pieces[-1])
        if have >= wanted:
            break
    stream = np.concatenate(pieces)[:wanted]
    count = (len(stream) - 1) // seq_len
    if count < 1:
        raise DataError(
            f"{' and '.join(str(file.path) for file in corpus.val)} holds {len(stream)} tokens for "
            f"validation, too few for one row of model.seq_len={seq_len}; choose another file, a "
            "larger data.val_share or a shorter seq_len"
        )
    starts = np.arange(count)[:, None] * seq_len
    rows = stream[starts + np.arange(seq_len + 1)]
    batches = -(-count // (batch_size * shard_count))
    inputs = np.zeros((batches * batch_size, seq_len), np.int32)
    targets = np.full_like(inputs, -1)
    mine = rows[shard_index::shard_count]
    inputs[: len(mine)], targets[: len(mine)] = mine[:, :-1], mine[:, 1:]
    cut = (np.split(inputs, batches), np.split(targets, batches))
    return [{"inputs": x, "targets": y} for x, y in zip(*cut, strict=True)]
