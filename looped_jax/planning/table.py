"""A plan as text: the run, a table of its costs, and whether it fits."""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Iterator

from looped_jax.model import flops
from looped_jax.planning import planner, step_time
from looped_jax.planning.collectives import Collective
from looped_jax.planning.compiled_cost import CompiledCost
from looped_jax.planning.planner import Choice, Plan
from looped_jax.planning.step_time import StepTime, Work

MEMORY_APART = 0.15  # share by which counted and compiled memory may differ without a word
KERNELS = {"cudnn": "cuDNN's", "splash": "splash", "xla": "XLA's"}
GIB = 2**30
WIDTH, LABEL = 100, 52  # columns of the text, and of the table's labels


def describe(plan: Plan) -> str:
    """The run in a few lines, a table with units, a verdict, and its assumptions."""
    head, verdict, notes = (
        "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in part)
        for part in (_head(plan), _verdict(plan), _notes(plan))
    )
    compiled = ["\n".join(_compiled(plan, plan.compiled))] if plan.compiled else []
    return "\n\n".join([head, "\n".join(_table(plan)), *compiled, verdict, notes])


def _head(plan: Plan) -> Iterator[str]:
    config, device, costs = plan.config, plan.hardware, flops.count(plan.config.model)
    model, train, mesh = config.model, config.train, dataclasses.asdict(config.mesh)
    devices = math.prod(mesh.values())
    yield (
        f"{model.variant}, L={model.layers}, K={model.loops}, D={model.width}, H={model.heads}, "
        f"T={model.seq_len}, V={model.vocab_size:,}, {model.dtype}: {_millions(costs.parameters)} "
        f"parameters ({_millions(costs.looped)} looped)"
    )
    where = ", ".join(
        f"{axis}={size} {_span(plan, axis)}" for axis, size in mesh.items() if size > 1
    )
    yield f"{devices} {device.name}, {device.per_node:,} a {_node(plan)}: {where or 'one device'}"
    tokens = train.steps * train.tokens_per_step
    yield (
        f"step: {train.tokens_per_step:,} tokens = {plan.requested.micro_batches} × "
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


def _span(plan: Plan, axis: str) -> str:
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

    kernel, requested = KERNELS[plan.requested.kernel], plan.config.model.remat
    yield row(
        "per device, for each model.remat (* as configured)",
        lambda c: c.config.model.remat + ("*" if c.config.model.remat == requested else ""),
    )
    yield "memory, GiB"
    yield gib("parameters (float32 shards)", lambda c: c.memory.parameters)
    yield gib("optimizer state", lambda c: c.memory.optimizer)
    yield gib("weights gathered, and cast to compute with", lambda c: c.memory.weights)
    yield gib("gradients", lambda c: c.memory.gradients)
    yield gib("activations saved for the backward pass", lambda c: c.memory.saved_activations)
    yield gib("activations of one loop, recomputed  (these two", lambda c: c.memory.recomputed)
    yield gib("a chunk of logits, and its gradient   take turns)", lambda c: c.memory.logits)
    yield gib(f"needed, with {kernel} attention", lambda c: c.memory.total)
    if kernel != KERNELS["xla"]:
        yield gib(f"needed, with {KERNELS['xla']} attention", lambda c: c.memory_xla.total)
    share = f"fits {planner.USABLE_MEMORY:.0%} of {device.memory / GIB:.1f} GiB"
    yield row(f"  {share}", lambda c: "yes" if plan.fits(c) else "NO")
    yield "work, TFLOP a step"
    yield tera("the model's, forward and backward", lambda work: work.model)
    yield tera("forward again, to recompute", lambda work: work.recomputed)
    yield tera("Newton–Schulz", lambda work: work.newton_schulz)
    yield "communication, MB sent a step"
    large = (one for c in choices for one in c.collectives if one.bytes_sent > 5e5)
    for kind in dict.fromkeys(map(_kind, large)):
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
    for axes, seconds in plan.requested.time.by_axes.items():
        if seconds < 1e-3 * plan.requested.time.total:  # scalars
            continue
        yield ms(f"collectives over {axes}", functools.partial(_seconds, axes))
    yield ms("step", lambda time: time.total)
    yield "speed"
    tokens = plan.config.train.tokens_per_step
    yield row("  tokens/s, all devices", lambda c: tokens / c.time.total)
    yield row("  utilization, %", lambda c: 100 * c.time.utilization)
    yield row("  hours to the horizon", _hours)


def _compiled(plan: Plan, cost: CompiledCost) -> Iterator[str]:
    """What the target's compiler says of the configuration as it is, beside what was counted."""
    planned, device = plan.requested.memory.total, plan.hardware
    remat = plan.config.model.remat
    yield f"compiled for {plan.target} by its own compiler, model.remat={remat}: estimates"
    apart = planned / cost.memory - 1

    def row(label: str, value: str) -> str:
        return f"  {label:<{LABEL - 2}} {value:>11}"

    yield row("memory at most, GiB", _short(cost.memory / GIB))
    yield row("  counted above, against it", f"{apart:+.0%}")
    if abs(apart) > MEMORY_APART:
        yield (
            "    apart, since temporary buffers are not counted and gradients and logits are "
            "counted whole"
        )
    for name, part in cost.parts.items():
        yield row(f"{name}, ms", _short(1e3 * part.seconds))
    yield row("step, ms", _short(1e3 * cost.seconds))
    useful = plan.requested.work.model / (cost.seconds * device.peak_flops)
    yield row("utilization, %", _short(100 * useful))
    yield row("kernels", _short(cost.kernels))
    yield row("read and written, GB", _short(cost.traffic / 1e9))
    for one in cost.collectives:
        if one.bytes_sent > 5e5:
            yield row(
                f"{one.purpose}: {one.kind} over {' × '.join(one.axes)}, MB sent",
                _short(one.bytes_sent / 1e6),
            )
    how = (
        f"cycles as its compiler estimates them, at {device.clock / 1e9:g} GHz; attention kernels, "
        "of which it knows nothing, charged"
        if device.clock
        else "no estimate of the compiler's: every kernel charged"
    )
    if cost.unknown:
        names = ", ".join(cost.unknown)
        yield f"  charged with their bytes alone, their products being unknown: {names}"
    yield from textwrap.wrap(
        f"  ({how} with the longer of their products at the peak and their bytes at the bandwidth; "
        "collectives in the open are what the work beside them, loops left out, does not hide)",
        WIDTH,
        subsequent_indent="  ",
    )


def _kind(collective: Collective) -> tuple[str, str, str]:
    return collective.purpose, collective.kind, " × ".join(collective.axes)


def _megabytes(kind: tuple[str, str, str], choice: Choice) -> float:
    return sum(one.bytes_sent for one in choice.collectives if _kind(one) == kind) / 1e6


def _seconds(axes: str, time: StepTime) -> float:
    return time.by_axes.get(axes, 0.0)


def _hours(choice: Choice) -> float:
    return choice.config.train.steps * choice.time.total / 3600


def _verdict(plan: Plan) -> Iterator[str]:
    requested, recommended = plan.requested, plan.recommended
    need = f"{requested.memory.total / GIB:.1f} GiB of {_usable(plan):.1f}"
    if plan.fits(requested):
        yield f"Verdict: fits, {need}. {_bound(plan, requested)}."
        yield from _memory_fraction(plan, requested)
    else:
        yield f"Verdict: DOES NOT FIT, {need}."
    if recommended:
        flags = " ".join(f"--config.{key}={value}" for key, value in plan.changes.items())
        yield f"Change: {flags}"
        time = recommended.time
        yield (
            f"  Then {recommended.memory.total / GIB:.1f} GiB, {1e3 * time.total:,.0f} ms a "
            f"step ({time.total / requested.time.total - 1:+.0%}), "
            f"{100 * time.utilization:.1f}% utilization, {_short(_hours(recommended))} hours. "
            f"{_bound(plan, recommended)}."
        )
        yield from _memory_fraction(plan, recommended)
    elif not plan.fits(requested):
        yield (
            "Neither a smaller train.batch_size or model.loss_chunk, nor more recomputation or "
            "mesh.fsdp, nor model.gather=layer makes it fit: use more or larger devices, "
            "mesh.tensor, or a smaller model."
        )


def _usable(plan: Plan) -> float:
    return planner.USABLE_MEMORY * plan.hardware.memory / GIB


def _memory_fraction(plan: Plan, choice: Choice) -> Iterator[str]:
    """The variable to set where JAX's default fraction of a GPU's memory is too small."""
    if (
        plan.hardware.platform == "gpu"
        and choice.memory.total > planner.JAX_FRACTION * plan.hardware.memory
    ):
        yield (
            f"  JAX takes {planner.JAX_FRACTION:.0%} of a GPU's memory unless told otherwise: set "
            f"XLA_CLIENT_MEM_FRACTION={planner.USABLE_MEMORY}."
        )


def _bound(plan: Plan, choice: Choice) -> str:
    """What limits the speed, and what would improve it."""
    time, mesh = choice.time, dataclasses.asdict(choice.config.mesh)
    share = time.communication / time.total
    text = f"Bound by {time.bound}; communication takes {share:.0%} of a step"
    if share < 0.2:
        return text
    if 2 * time.by_axes.get("tensor", 0) > time.communication:
        return f"{text}: mesh.tensor sends activations in every loop, a smaller one sends less"
    fsdp_inside = step_time.members_in_node(("fsdp",), mesh, plan.hardware)
    if mesh["fsdp"] > fsdp_inside:
        return (
            f"{text}: keep mesh.fsdp within a {_node(plan)}, at most {fsdp_inside} here, if that "
            "fits"
        )
    if choice.config.model.gather == "layer":
        return (
            f"{text}: a larger train.batch_size gathers less often, model.gather=step once a step"
        )
    return f"{text}, and a larger train.tokens_per_step would need no more communication"


def _notes(plan: Plan) -> Iterator[str]:
    device, of_peak = plan.hardware, f"{plan.efficiency:.0%}"
    how = {
        "assumed": "Assumed: matrix products reach {} of the peak (--efficiency) at any batch size",
        "given": "Given: matrix products reach {} of the peak (--efficiency) at any batch size",
        "compiled": f"As compiled for {plan.target}: the work of a step, all else beside it, goes "
        "at {} of the peak, taken for every model.remat (--efficiency says another)",
    }[plan.source]
    yield (
        f"{how.format(of_peak)}; memory and links run at the rates of the data sheet "
        f"({device.link / 1e9:,.0f} GB/s within a {_node(plan)}, {device.network / 1e9:,.3g} GB/s "
        f"beyond: {device.source}); communication does not overlap with compute."
    )
    yield (
        "Needed memory is counted: all that the forward pass saves for the backward pass, without "
        "temporary buffers. What is sent is what the traced step says, and over tensor what its "
        "layers need. --target asks the compiler of the hardware for both."
    )


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


def _short(number: float) -> str:
    """Three digits at least: 0.0123, 1.23, 123, 12,345."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
