"""A plan in words: what the run is, a table of what it takes, and whether and how it fits."""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Iterator

from looped_jax.model import flops
from looped_jax.planning import planner, step_time
from looped_jax.planning.collectives import Collective
from looped_jax.planning.planner import Choice, Plan
from looped_jax.planning.step_time import StepTime, Work

DEFAULT = 0.75  # of a GPU's memory is what JAX takes: docs.jax.dev, "GPU memory allocation"
KERNELS = {"cudnn": "cuDNN's", "splash": "splash", "xla": "XLA's"}
GIB = 2**30
WIDTH, LABEL = 100, 52  # columns of the page, and of the table's labels


def describe(plan: Plan) -> str:
    """The run in a few lines, a table with units, a verdict, and what it rests on."""
    head, verdict, notes = (
        "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in part)
        for part in (_head(plan), _verdict(plan), _notes(plan))
    )
    return "\n\n".join([head, "\n".join(_table(plan)), verdict, notes])


def _head(plan: Plan) -> Iterator[str]:
    config, device, costs = plan.config, plan.hardware, flops.count(plan.config.model)
    model, train, mesh = config.model, config.train, dataclasses.asdict(config.mesh)
    assert train.steps
    devices = math.prod(mesh.values())
    yield (
        f"{model.variant}, L={model.layers}, K={model.loops}, D={model.width}, H={model.heads}, "
        f"T={model.seq_len}, V={model.vocab_size:,}, {model.dtype}: {_millions(costs.parameters)} "
        f"parameters ({_millions(costs.looped)} looped)"
    )
    where = ", ".join(
        f"{axis}={size} {_place(plan, axis)}" for axis, size in mesh.items() if size > 1
    )
    yield f"{devices} {device.name}, {device.per_node:,} a {_node(plan)}: {where or 'one device'}"
    tokens = train.steps * train.tokens_per_step
    yield (
        f"step: {train.tokens_per_step:,} tokens = {plan.asked.micro_batches} × "
        f"{train.batch_size} rows of {model.seq_len:,} on each of {mesh['data'] * mesh['fsdp']} "
        "batch devices"
    )
    yield (
        f"run: {train.steps:,} steps, {tokens / 1e9:.2f} billion tokens, "
        f"{tokens / costs.parameters:.1f} per parameter, "
        f"{tokens * costs.flops:.2e} FLOP ({costs.flops / 1e9:.2f} GFLOP per token)"
    )
    for warning in plan.warnings:
        yield f"WARNING: {warning}"


def _place(plan: Plan, axis: str) -> str:
    mesh = dataclasses.asdict(plan.config.mesh)
    inside = step_time.members_in_node((axis,), mesh, plan.hardware)
    if inside == mesh[axis]:
        return f"within a {_node(plan)}"
    return f"across {_node(plan)}s" + (f", {inside} in each" if inside > 1 else "")


def _node(plan: Plan) -> str:
    return "node" if plan.hardware.platform == "gpu" else "pod"


def _table(plan: Plan) -> Iterator[str]:
    device, choices = plan.hardware, list(plan.choices.values())

    def row(label: str, value: Callable[[Choice], float | str]) -> str:
        cells = (value(choice) for choice in choices)
        texts = (cell if isinstance(cell, str) else _short(cell) for cell in cells)
        return f"{label:<{LABEL}}" + "".join(f" {text:>11}" for text in texts)

    def gib(label: str, value: Callable[[Choice], int]) -> str:
        return row(f"  {label}", lambda c: value(c) / GIB)

    def tera(label: str, value: Callable[[Work], float]) -> str:
        return row(f"  {label}", lambda c: value(c.work) / 1e12)

    def ms(label: str, value: Callable[[StepTime], float]) -> str:
        return row(f"  {label}", lambda c: 1e3 * value(c.time))

    kernel, asked = KERNELS[plan.asked.kernel], plan.config.model.remat
    yield row(
        "per device, for each model.remat (* as configured)",
        lambda c: c.config.model.remat + ("*" if c.config.model.remat == asked else ""),
    )
    yield "memory, GiB"
    yield gib("parameters (float32 shards)", lambda c: c.memory.parameters)
    yield gib("optimizer state", lambda c: c.memory.optimizer)
    yield gib("weights gathered, and cast to compute with", lambda c: c.memory.weights)
    yield gib("gradients", lambda c: c.memory.gradients)
    yield gib("activations kept for the backward pass", lambda c: c.memory.kept)
    yield gib("activations of one loop, recomputed  (these two", lambda c: c.memory.recomputed)
    yield gib("a chunk of logits, and its gradient   take turns)", lambda c: c.memory.logits)
    yield gib(f"needed, with {kernel} attention", lambda c: c.memory.total)
    if kernel != KERNELS["xla"]:
        yield gib(f"needed, with {KERNELS['xla']} attention", lambda c: c.memory_xla.total)
    yield gib(
        f"compiled on CPU, with {KERNELS['xla']} attention",
        lambda c: c.arguments + c.temporaries,
    )
    share = f"fits {planner.USABLE:.0%} of {device.memory / GIB:.1f} GiB"
    yield row(f"  {share}", lambda c: "yes" if plan.fits(c) else "NO")
    yield "work, TFLOP a step"
    yield tera("the model's, forward and backward", lambda work: work.model)
    yield tera("forward again, to recompute", lambda work: work.recomputed)
    yield tera("Newton–Schulz", lambda work: work.newton_schulz)
    yield "sent, MB a step"
    messages = dict.fromkeys(_kind(m) for c in choices for m in c.collectives if m.sent > 5e5)
    for kind in messages:
        purpose, name, axes = kind
        yield row(
            f"  {purpose}: {name} over {axes}",
            functools.partial(_megabytes, kind),
        )
    yield "time, ms a step"
    peak = f"{plan.efficiency:.0%} of {device.peak_flops / 1e12:,.0f} TFLOP/s"
    yield ms(f"{f'compute, at {peak}':<35} (the larger", lambda time: time.compute)
    bandwidth = f"{device.memory_bandwidth / 1e12:.2f} TB/s"
    yield ms(f"{f'memory traffic, at {bandwidth}':<35}  of the two)", lambda time: time.memory)
    for axes, seconds in plan.asked.time.by_axes.items():
        if seconds < 1e-3 * plan.asked.time.total:  # scalars
            continue
        yield ms(f"messages over {axes}", functools.partial(_seconds, axes))
    yield ms("step", lambda time: time.total)
    yield "speed"
    tokens = plan.config.train.tokens_per_step
    yield row("  tokens/s, all devices", lambda c: tokens / c.time.total)
    yield row("  utilisation, %", lambda c: 100 * c.time.utilization)
    yield row("  hours to the horizon", _hours)


def _kind(message: Collective) -> tuple[str, str, str]:
    return message.purpose, message.kind, " × ".join(message.axes)


def _megabytes(kind: tuple[str, str, str], choice: Choice) -> float:
    return sum(message.sent for message in choice.collectives if _kind(message) == kind) / 1e6


def _seconds(axes: str, time: StepTime) -> float:
    return time.by_axes.get(axes, 0.0)


def _hours(choice: Choice) -> float:
    assert choice.config.train.steps
    return choice.config.train.steps * choice.time.total / 3600


def _verdict(plan: Plan) -> Iterator[str]:
    asked, better = plan.asked, plan.better
    need = f"{asked.memory.total / GIB:.1f} GiB of {_room(plan):.1f}"
    if plan.fits(asked):
        yield f"Verdict: fits, {need}. {_bound(plan, asked)}."
        yield from _fraction(plan, asked)
    else:
        yield f"Verdict: DOES NOT FIT, {need}."
    if better:
        flags = " ".join(f"--config.{key}={value}" for key, value in plan.changes.items())
        yield f"Change: {flags}"
        yield (
            f"  Then {better.memory.total / GIB:.1f} GiB, {1e3 * better.time.total:,.0f} ms a "
            f"step ({better.time.total / asked.time.total - 1:+.0%}), "
            f"{100 * better.time.utilization:.1f}% utilisation, {_short(_hours(better))} hours. "
            f"{_bound(plan, better)}."
        )
        yield from _fraction(plan, better)
    elif not plan.fits(asked):
        yield (
            "Neither a smaller train.batch_size or model.loss_chunk, nor more recomputation or "
            "mesh.fsdp makes it fit: use more or larger devices, mesh.tensor, or a smaller model."
        )


def _room(plan: Plan) -> float:
    return planner.USABLE * plan.hardware.memory / GIB


def _fraction(plan: Plan, choice: Choice) -> Iterator[str]:
    """What to tell JAX where its default would leave too little of a GPU's memory."""
    if plan.hardware.platform == "gpu" and choice.memory.total > DEFAULT * plan.hardware.memory:
        yield (
            f"  JAX takes {DEFAULT:.0%} of a GPU's memory unless told otherwise: set "
            f"XLA_CLIENT_MEM_FRACTION={planner.USABLE}."
        )


def _bound(plan: Plan, choice: Choice) -> str:
    """What limits the speed, and what would help against it."""
    time, mesh = choice.time, dataclasses.asdict(choice.config.mesh)
    share = f"Bound by {time.bound}; messages take {time.communication / time.total:.0%} of a step"
    if time.communication < 0.2 * time.total:
        return share
    if 2 * time.by_axes.get("tensor", 0) > time.communication:
        return f"{share}: mesh.tensor sends activations in every loop, a smaller one sends fewer"
    fsdp_inside = step_time.members_in_node(("fsdp",), mesh, plan.hardware)
    if mesh["fsdp"] > fsdp_inside:
        return (
            f"{share}: keep mesh.fsdp within a {_node(plan)}, at most {fsdp_inside} here, if that "
            "fits"
        )
    return f"{share}, and a larger train.tokens_per_step would need no more of them"


def _notes(plan: Plan) -> Iterator[str]:
    device = plan.hardware
    yield (
        f"Assumed: matrix products reach {plan.efficiency:.0%} of the peak (--efficiency) at any "
        "batch size; memory and links run at their stated rates "
        f"({device.link / 1e9:,.0f} GB/s within a {_node(plan)}, {device.network / 1e9:,.3g} GB/s "
        f"beyond: {device.source}); no message hides behind compute."
    )
    yield (
        "Needed memory is counted: all that the forward pass hands to the backward pass, without "
        "passing buffers. The CPU compiler holds attention weights besides, and widens bfloat16 to "
        "float32; messages are counted in their own type."
    )


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


def _short(number: float) -> str:
    """Three digits at least: 0.0123, 1.23, 123, 12,345."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
