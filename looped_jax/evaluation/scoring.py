"""Scoring tokens and answers at many loop counts from one forward pass, on any mesh.

The state after loop k is what a model of k loops ends with, so the largest count contains all.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config.resolved import ModelConfig
from looped_jax.model import loss, transformer
from looped_jax.model.transformer import Params
from looped_jax.runtime import sharding

Array = jax.Array


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
    """Scores many rows of any lengths; lengths and spans are rounded up so that few shapes compile.

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
        """`batch_size` rows at once on each device that takes a share of the batch.

        `progress` is told rows done and rows in all after every batch.
        """
        self._mesh = mesh
        self._params = jax.device_put(params, transformer.shardings(model, mesh))
        self._rows = batch_size * sharding.batch_devices(mesh)
        self._step = functools.partial(make_span_step, model, mesh, tuple(loop_counts))
        self._loops, self._progress = len(loop_counts), progress

    def __call__(self, rows: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """(mean nats float32 [rows, N], all targets hit bool [rows, N]), in the order of `rows`."""
        nats = np.zeros((len(rows), self._loops), np.float32)
        hits = np.zeros((len(rows), self._loops), bool)
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            length = _round_up(len(row.tokens) - 1, 64, 2)  # the last token only is a target
            alike[length + 1, _round_up(row.end - row.start, 16, 4)].append(index)
        spec, done = P(sharding.BATCH_AXES), 0
        for (length, width), indices in sorted(alike.items()):
            for first in range(0, len(indices), self._rows):
                batch = indices[first : first + self._rows]
                tokens = np.zeros((self._rows, length), np.int32)
                starts, ends = np.ones((2, self._rows), np.int32)
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


def _round_up(size: int, least: int, factor: int) -> int:
    """The first of least, factor · least, factor² · least, … that is not below `size`."""
    while least < size:
        least *= factor
    return least
