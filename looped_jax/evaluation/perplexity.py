"""Perplexities: of a running text such as WikiText-2, and of LAMBADA's last words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from looped_jax.data.tokenizer import Tokenizer
from looped_jax.errors import DataError
from looped_jax.evaluation.core import Row

ScoreRows = Callable[[Sequence[Row]], tuple[np.ndarray, np.ndarray]]


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a text file, or of a parquet file's `text` column. Raises DataError."""
    try:
        if path.suffix == ".parquet":
            lines = pq.read_table(path, columns=["text"])["text"].to_pylist()
        else:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read ({reason}); give a text or parquet file") from error
    lines = [line for line in lines if line and line.strip()]
    if not lines:
        raise DataError(f"{path} holds no text; give another file")
    return lines


def text_perplexity(
    score: ScoreRows, tokenizer: Tokenizer, lines: Sequence[str], *, seq_len: int
) -> np.ndarray:
    """exp of the mean token loss at each loop count, float64 [N].

    The lines, each behind a start token, make one stream that is cut into rows of `seq_len`
    targets; what does not fill a row is left out, as the reference does.
    """
    stream = np.concatenate(tokenizer.encode_documents(lines))
    count = (len(stream) - 1) // seq_len
    if count < 1:
        raise DataError(f"{len(stream)} tokens of text do not fill one row of {seq_len}")
    rows = [Row(stream[r * seq_len : (r + 1) * seq_len + 1], 1, seq_len + 1) for r in range(count)]
    nats, _ = score(rows)
    return np.exp(nats.astype(np.float64).mean(axis=0))


def last_word_perplexity(
    score: ScoreRows, tokenizer: Tokenizer, path: Path, *, max_len: int, limit: int | None = None
) -> np.ndarray:
    """LAMBADA: exp of the mean loss of the last word, float64 [N].

    Each JSON line has `context` and `continuation`; a word's loss is the sum over its tokens, its
    context is cut from the left to `max_len` tokens. Raises DataError naming file and line.
    """
    rows: list[Row] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give --bundle") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or (limit is not None and len(rows) >= limit):
            continue
        try:
            item = json.loads(line)
            context, word = item["context"].strip(), " " + item["continuation"].strip()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: no context and continuation") from error
        before, target = tokenizer.encode(context), tokenizer.encode(word)
        tokens = [tokenizer.bos_id, *before, *target][-max_len:]
        rows.append(Row(np.array(tokens, np.int32), len(tokens) - len(target), len(tokens)))
    nats, _ = score(rows)
    lengths = np.array([[row.end - row.start] for row in rows])
    return np.exp((nats.astype(np.float64) * lengths).mean(axis=0))
