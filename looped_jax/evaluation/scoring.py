"""Scoring tokens and answers at many loop counts from one forward pass, on any mesh.

The state after loop k is what a model of k loops ends with, so the largest count contains all.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config.resolved import ModelConfig
from looped_jax.model import attention_kernels, loss, transformer
from looped_jax.model.transformer import Params
from looped_jax.runtime import sharding

Array = jax.Array
LONGEST = 10  # rows, in model.seq_len: where the rotary tables of the reference end


def longest_row(model: ModelConfig) -> int:
    """Tokens up to which prompts are whole where nothing else is asked for."""
    return model.longest_row() or LONGEST * model.seq_len


@functools.lru_cache(maxsize=8)  # many checkpoints of a run compile once
def make_score_step(
    model: ModelConfig, mesh: Mesh, loop_counts: tuple[int, ...]
) -> jax.stages.Wrapped:
    """Jitted (params, inputs [rows, T], targets, token_bytes [V]) -> (nats [N], bytes []).

    Sums over targets that have bytes, after each of the N loop counts; targets < 0 are ignored.
    """
    axes, run = sharding.batch_axes(mesh), transformer.make_hidden_states(model, mesh, loop_counts)

    def score(full: Params, inputs: Array, targets: Array, token_bytes: Array):
        states = run(full, inputs)
        size = jnp.where(targets < 0, 0, token_bytes[jnp.maximum(targets, 0)])
        targets = jnp.where(size > 0, targets, -1)
        nats = loss.token_losses(model, full, states, targets).sum((1, 2))
        return jax.lax.psum((nats, size.sum()), axes)

    rows = P(sharding.BATCH_AXES)
    return jax.jit(
        transformer.on_mesh(
            model,
            mesh,
            score,
            in_specs=(rows, rows, P()),
            out_specs=P(),
        )
    )


@functools.lru_cache(maxsize=8)
def make_hit_step(
    model: ModelConfig, mesh: Mesh, loop_counts: tuple[int, ...]
) -> jax.stages.Wrapped:
    """Jitted (params, inputs [B, T], targets [B, T] or [B, N, T]) -> hits bool [N, B, T].

    Whether each target is the likeliest token after each of the N loop counts, known to every
    process; targets are shared by all counts, or each one's own.
    """
    run = transformer.make_hidden_states(model, mesh, loop_counts)

    def score(full: Params, inputs: Array, targets: Array) -> Array:
        own = targets if targets.ndim == 2 else jnp.moveaxis(targets, 1, 0)
        return loss.token_hits(model, full, run(full, inputs), own)

    rows = P(sharding.BATCH_AXES)
    program = transformer.on_mesh(
        model,
        mesh,
        score,
        in_specs=(rows, rows),
        out_specs=P(None, sharding.BATCH_AXES),
    )
    return jax.jit(program, out_shardings=NamedSharding(mesh, P()))  # every process reads all


@functools.lru_cache(maxsize=64)  # weights that are scored again and again compile once
def make_span_step(
    model: ModelConfig, mesh: Mesh, loop_counts: tuple[int, ...], width: int
) -> jax.stages.Wrapped:
    """Jitted (params, tokens [B, T + 1], starts [B], ends [B]) -> (nats [B, N], all hit [B, N]).

    Of the targets tokens[start:end] of each row, at most `width` of them: the mean loss, and
    whether each was the likeliest token. Only these positions pass the head.
    """

    run = transformer.make_hidden_states(model, mesh, loop_counts)

    def score(full: Params, tokens: Array, starts: Array, ends: Array) -> tuple[Array, Array]:
        states = run(full, tokens[:, :-1])
        positions = starts[:, None] + jnp.arange(width)
        inside = positions < ends[:, None]
        positions = jnp.minimum(positions, tokens.shape[1] - 1)
        targets = jnp.where(inside, jnp.take_along_axis(tokens, positions, axis=1), -1)
        states = jnp.take_along_axis(states, positions[None, :, :, None] - 1, axis=2)
        nats = loss.token_losses(model, full, states, targets).sum(-1)
        hits = loss.token_hits(model, full, states, targets) | ~inside
        return (nats / jnp.maximum(ends - starts, 1)).T, hits.all(-1).T

    rows = P(sharding.BATCH_AXES)
    program = transformer.on_mesh(
        model,
        mesh,
        score,
        in_specs=(rows,) * 3,
        out_specs=rows,
    )
    return jax.jit(program, out_shardings=NamedSharding(mesh, P()))  # every process reads all


class Span(Protocol):
    """A row of tokens int32 [n] whose targets tokens[start:end] are scored, start ≥ 1."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


class SpanScorer:
    """Scores many rows of any lengths, those of like length together, in few compiled shapes.

    What a row scores does not depend on the others: attention is causal and rows are padded on
    the right.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        mesh: Mesh,
        *,
        loop_counts: Sequence[int],
        batch_size: int,
        progress: Callable[[int, int], None] | None = None,
    ):
        """`batch_size` rows of model.seq_len at once on each device with a share of the batch.

        Of longer rows fewer, so that they take no more memory. `progress` is told rows done and
        rows in all after every batch.
        """
        self._mesh = mesh
        self._params = jax.device_put(params, transformer.shardings(model, mesh))
        self._devices, self._batch_size = sharding.batch_devices(mesh), batch_size
        self._seq_len, self._tile = model.seq_len, attention_kernels.tile(model, mesh)
        self._step = functools.partial(make_span_step, model, mesh, tuple(loop_counts))
        self._loops, self._progress = len(loop_counts), progress

    def __call__(self, rows: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """(mean nats float32 [rows, N], all targets hit bool [rows, N]), in the order of `rows`."""
        nats = np.zeros((len(rows), self._loops), np.float32)
        hits = np.zeros((len(rows), self._loops), bool)
        spec, done = P(sharding.BATCH_AXES), 0
        for length, width, size, batch in self._batches(rows):
            tokens = np.zeros((size, length), np.int32)
            starts, ends = np.ones((2, size), np.int32)
            for slot, index in enumerate(batch):
                row = rows[index]
                tokens[slot, : len(row.tokens)] = row.tokens
                starts[slot], ends[slot] = row.start, row.end
            arguments = (sharding.put(a, self._mesh, spec) for a in (tokens, starts, ends))
            found = jax.device_get(self._step(width)(self._params, *arguments))
            nats[batch], hits[batch] = (array[: len(batch)] for array in found)
            done += len(batch)
            if self._progress is not None:
                self._progress(done, len(rows))
        return nats, hits

    def _batches(self, rows: Sequence[Span]) -> Iterator[tuple[int, int, int, list[int]]]:
        """Length, span and rows to compile for, and the indices of the rows; the longest first."""
        by_width: dict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            by_width[power_up(row.end - row.start, 16, 4)].append(index)
        for width, alike in sorted(by_width.items()):
            left = sorted(alike, key=lambda index: -len(rows[index].tokens))
            while left:
                inputs = round_up(len(rows[left[0]].tokens) - 1, self._tile)  # the last one is a
                fewer = min(1, self._seq_len / inputs)  # target only
                size = max(1, int(self._batch_size * fewer)) * self._devices
                yield inputs + 1, width, size, left[:size]
                left = left[size:]


def round_up(length: int, tile: int) -> int:
    """The next multiple of `tile`, or of the largest power of two within an eighth of `length`.

    So a row is filled up by less than an eighth, or to one tile more, and few shapes compile.
    """
    unit = max(tile, 1 << max(length.bit_length() - 4, 0))
    return -(-max(length, 1) // unit) * unit


def power_up(size: int, least: int, factor: int) -> int:
    """The first of least, factor · least, factor² · least, … that is not below `size`."""
    while least < size:
        least *= factor
    return least
