"""Perplexities: of a running text such as WikiText-2, and of LAMBADA's last words.

Each by the definition of FLT's PyTorch code, and by one of our own beside it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from looped_jax.data.tokenizer import Tokenizer
from looped_jax.errors import DataError
from looped_jax.evaluation.core import SHUFFLE_SEED, Row

ScoreRows = Callable[[Sequence[Row]], tuple[np.ndarray, np.ndarray]]


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, or of a parquet file's `text` column; blank ones are "".

    Raises DataError.
    """
    try:
        if path.suffix == ".parquet":
            lines = pq.read_table(path, columns=["text"])["text"].to_pylist()
        else:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read ({reason}); give a text or parquet file") from error
    lines = [line if line and line.strip() else "" for line in lines]
    if not any(lines):
        raise DataError(f"{path} holds no text; give another file")
    return lines


def text_perplexity(
    score: ScoreRows, tokenizer: Tokenizer, lines: Sequence[str], *, seq_len: int
) -> np.ndarray:
    """exp of the mean token loss at each loop count, float64 [N].

    The lines, each behind a start token, make one stream that is cut into rows of `seq_len`
    targets; what does not fill a row is left out. With blank lines, a start token each, it is what
    the reference finds one row at a time: of larger batches it also leaves out rows at the end that
    do not fill one.
    """
    stream = np.concatenate(tokenizer.encode_documents(lines))
    count = (len(stream) - 1) // seq_len
    if count < 1:
        raise DataError(f"{len(stream)} tokens of text do not fill one row of {seq_len}")
    rows = [Row(stream[r * seq_len : (r + 1) * seq_len + 1], 1, seq_len + 1) for r in range(count)]
    nats, _ = score(rows)
    return np.exp(nats.astype(np.float64).mean(axis=0))


def last_words(
    tokenizer: Tokenizer, path: Path, *, max_len: int, limit: int | None = None
) -> list[Row]:
    """LAMBADA's rows, the last word of each the span that is scored.

    Each JSON line has `context` and `continuation`; the context is cut from the left to `max_len`
    tokens in all. With a `limit` the rows are that many, drawn as CORE draws its examples. Raises
    DataError naming file and line.
    """
    texts: list[tuple[str, str]] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give --bundle") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            texts.append((item["context"].strip(), " " + item["continuation"].strip()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: no context and continuation") from error
    if limit is not None:
        random.Random(SHUFFLE_SEED).shuffle(texts)
    rows: list[Row] = []
    for context, word in texts[:limit]:
        before, target = tokenizer.encode(context), tokenizer.encode(word)
        whole = [tokenizer.bos_id, *before, *target]
        tokens = whole[-max_len:]
        start = max(len(tokens) - len(target), 1)  # a first token has nothing before it
        rows.append(
            Row(np.array(tokens, np.int32), start, len(tokens), cropped=len(whole) > max_len)
        )
    if not rows:
        raise DataError(f"{path} holds no text; fetch the bundle again")
    return rows


def last_word_perplexities(score: ScoreRows, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Per token and per word of the spans of `rows`, float64 [N] each; inf beyond floats.

    exp of the mean loss of a token, as the reference has it; and of a word, which is the sum over
    its tokens: unlike the first it does not sink when a tokenizer cuts words into more tokens.
    """
    nats, _ = score(rows)
    sizes = np.array([[row.end - row.start] for row in rows])
    total = (nats.astype(np.float64) * sizes).sum(axis=0)
    with np.errstate(over="ignore"):
        return np.exp(total / sizes.sum()), np.exp(total / len(rows))
