"""A pass whose number of loops is data: counts drawn by the host, gradients through the last few.

Legend: B batch, T time, D width, L layers, k the most loops that gradients pass.

All rows end together, so that the loops with gradients are the same ones for all. A row that runs
fewer loops than the longest begins later; until then it runs its first loop again and again. The
loops before the last `backward` are truncated: no gradient passes them, and none of their
activations is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from looped_jax.config.resolved import ModelConfig
from looped_jax.model import transformer
from looped_jax.model.attention_kernels import Attend, plain
from looped_jax.model.full_pass import FullPass
from looped_jax.model.loop_scan import counted_loops
from looped_jax.model.probe import BLIND, Probe, mean_norm
from looped_jax.model.transformer import LoopStates, Params

Array = jax.Array
Batch = dict[str, Array]
Carry = tuple[Array, Any]  # the state, and what parts hand on beside it


class Counts(NamedTuple):
    """How many loops a pass runs; traced int32.

    rows: [B] loops of each row, or None where all run `total`
    total: [] loops that are run, at least as many as any row has
    backward: [] of these, the last through which gradients go; at most `total`
    """

    rows: Array | None
    total: Array
    backward: Array


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    counts: Counts,
    *,
    longest: int,
    probe: Probe = BLIND,
    attend: Attend = plain,
    seeds: Array | None = None,
) -> LoopStates:
    """The state after every row's last loop, of tokens [B, T]; hidden is [1, B, T, D].

    `longest` is k, the room for loops with gradients; norms and what `probe` sees are of these, in
    their order, zero where `counts.backward` is less. Every count runs in the same program.
    `seeds`: as in transformer.forward.
    """
    learned = _one_loop(config, params, tokens, counts, attend, seeds)
    stopped = _one_loop(config, jax.lax.stop_gradient(params), tokens, counts, attend, seeds)

    def body(carry: Carry, of_loop: tuple[Array, Any]) -> tuple[Carry, Any]:
        return learned.run(carry, of_loop[0], probe, of_loop[1])

    (h, carried), (norms, seen) = counted_loops(
        body,
        lambda carry, left: stopped.run(carry, left, BLIND, None)[0],
        learned.initial,
        counts.total,
        counts.backward,
        longest=longest,
        inputs=probe.inputs,
        remat=config.remat,
    )
    return LoopStates(learned.leave(h, carried)[None], norms, seen)


def in_step(batch: Batch, axes: tuple[str, ...]) -> Batch:
    """A step's batch with what its M micro-batches run: "total" and "backward" int32 [M].

    Its "loops" and "backward_loops" are int32 [M, rows], on each device those of its own rows. All
    devices along `axes` run as many loops: they wait for each other at the end of the step anyway,
    and where weights are cut by heads they have to be in step inside of a loop.
    """
    total = jax.lax.pmax(batch["loops"].max(1), axes)
    backward = jax.lax.pmax(batch["backward_loops"].max(1), axes)
    return batch | {"total": total, "backward": jnp.minimum(backward, total)}


def passes(batch: Batch, longest: int) -> Array:
    """How many micro-batches of a step run each of the loops with gradients, int32 [k]."""
    return (jnp.arange(longest, 0, -1)[:, None] <= batch["backward"]).sum(1)


def run_in(batch: Batch, axes: tuple[str, ...]) -> dict[str, Array]:
    """Means of a step that `in_step` has prepared, float32: loops "drawn" for a row, loops "spent"
    by a micro-batch, and of these "backward", those with gradients."""
    return {
        "drawn": jax.lax.pmean(batch["loops"].mean(), axes),
        "spent": batch["total"].mean(),
        "backward": batch["backward"].mean(),
    }


class _Loop(NamedTuple):
    """One loop of a model that has seen its tokens.

    initial: what a row's first loop begins with
    run: (carry, left, probe, inputs) -> (carry, kept)
    leave: (state, carried) -> what the head reads
    """

    initial: Carry
    run: Callable[[Carry, Array, Probe, Any], tuple[Carry, Any]]
    leave: Callable[[Array, Any], Array]


def _one_loop(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    counts: Counts,
    attend: Attend,
    seeds: Array | None,
) -> _Loop:
    model = transformer.bind(config, params)
    here = model.enter(tokens, jnp.arange(tokens.shape[1]), FullPass(attend).open, seeds)
    initial = model.begin(here)

    def run(carry: Carry, left: Array, probe: Probe, inputs: Any) -> tuple[Carry, Any]:
        if counts.rows is None:
            loop = counts.total - left
            first = model.first(loop)
        else:
            loop = jnp.maximum(counts.rows - left, 0)[:, None]
            first = model.first(loop)[..., None]
        # Where it begins: gradients reach it, which they do not through the carry of the scan.
        h, carried = jax.tree.map(functools.partial(_unless, loop == 0), initial, carry)
        view = probe.view(loop, inputs)
        now = here._replace(h=h, loop=loop, first=first, carried=carried)
        x = model.loop(now, FullPass(attend, view).open, view)
        return (view("state", None, model.norm(x)), now.carried), (mean_norm(x), view.seen())

    return _Loop(initial, run, lambda h, carried: model.leave(h, carried, here))


def _unless(begins: Array, initial: Array, x: Array) -> Array:
    """x [B, T, …], or what it is at first where a loop [] or [B, 1] is a row's first."""
    return jnp.where(begins.reshape(*begins.shape, *[1] * (x.ndim - 2)), initial, x)
