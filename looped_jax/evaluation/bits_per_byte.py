"""Bits per byte: a loss that does not depend on the tokenizer; and perplexity, which does.

Σ nats over targets that have bytes ÷ (ln 2 · Σ bytes): a ratio of sums, not a mean of ratios.
Special tokens have no bytes and do not count.

Of tokens that nobody knows the text of, each counts as a byte; what comes out is bits per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.data.tokenizer import Tokenizer
from looped_jax.model.transformer import Params
from looped_jax.runtime import sharding

Batch = dict[str, np.ndarray]


def bits_per_byte(
    score: Callable,
    params: Params,
    batches: Iterable[Batch],
    token_bytes: np.ndarray,
    *,
    loop_counts: tuple[int, ...],
    mesh: Mesh,
) -> dict[int, float]:
    """Bits per byte at each loop count, from one forward pass per batch.

    `score` is scoring.make_score_step's; batches hold this process's inputs and targets [rows, T].
    """
    rows = NamedSharding(mesh, P(sharding.BATCH_AXES))
    sizes = jax.device_put(token_bytes, NamedSharding(mesh, P()))
    nats, size = np.zeros(len(loop_counts)), 0
    for batch in batches:
        inputs, targets = (
            jax.make_array_from_process_local_data(rows, batch[k]) for k in ("inputs", "targets")
        )
        batch_nats, batch_bytes = jax.device_get(score(params, inputs, targets, sizes))
        nats, size = nats + batch_nats, size + int(batch_bytes)
    return {k: float(n) / (math.log(2) * size) for k, n in zip(loop_counts, nats, strict=True)}


def perplexity(bits_per_byte: float, counts: np.ndarray, token_bytes: np.ndarray) -> float:
    """exp of the mean nats per scored target, for targets of these counts [V]; inf beyond floats.

    The sums are those of the bits per byte, so special tokens do not count here either, and it is
    per token: only runs with the same tokenizer may be compared by it.
    """
    counts = np.where(token_bytes == 0, 0, counts)
    nats = bits_per_byte * math.log(2) * np.dot(counts, token_bytes)
    with np.errstate(over="ignore"):
        return float(np.exp(nats / counts.sum()))


def bytes_of(tokenizer: Tokenizer | None, vocab_size: int) -> np.ndarray:
    """How much each token counts, int32 [V]: its bytes, or 1 where nobody knows them."""
    return np.ones(vocab_size, np.int32) if tokenizer is None else tokenizer.token_bytes


def count_targets(batches: Iterable[Batch], vocab_size: int) -> np.ndarray:
    """How often each token is a target, float64 [V]."""
    counts = np.zeros(vocab_size)
    for batch in batches:
        targets = batch["targets"]
        counts += np.bincount(targets[targets >= 0], minlength=vocab_size)
    return counts


def unigram_bits_per_byte(counts: np.ndarray, token_bytes: np.ndarray) -> float:
    """What the best unigram model reaches on targets of these counts [V]: one fitted to them."""
    counts = np.where(token_bytes == 0, 0, counts)
    seen = counts[counts > 0]
    nats = -np.sum(seen * np.log(seen / seen.sum()))
    return float(nats / (math.log(2) * np.dot(counts, token_bytes)))
