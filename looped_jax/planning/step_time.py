"""Estimated time of one training step, from counted work and the data sheet of the hardware."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from looped_jax.config.resolved import Config, ModelConfig
from looped_jax.model import flops, objectives, transformer
from looped_jax.planning.collectives import Collective
from looped_jax.planning.memory import logit_chunk, looped_alone, saved_residuals, unlooped
from looped_jax.runtime.hardware import Hardware


@dataclass(frozen=True)
class Work:
    """Work of one device in one step: FLOPs, and bytes to and from its memory.

    model: forward and backward, by flops.count; recomputed: forward again, by model.remat;
    newton_schulz: of Muon; traffic: bytes that no compiler can avoid to read or write
    """

    model: float
    recomputed: float
    newton_schulz: float
    traffic: float

    @property
    def flops(self) -> float:
        return self.model + self.recomputed + self.newton_schulz


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: the larger of compute and memory, then communication, all of it exposed.

    by_axes: the part of communication that crosses these mesh axes
    utilization: model FLOPs per second over the peak of the data sheet
    """

    compute: float
    memory: float
    communication: float
    by_axes: dict[str, float]
    utilization: float

    @property
    def total(self) -> float:
        return max(self.compute, self.memory) + self.communication

    @property
    def bound(self) -> str:
        """What most of the step is spent on."""
        if self.communication > max(self.compute, self.memory):
            return "the network"
        return "compute" if self.compute >= self.memory else "memory bandwidth"


def work(config: Config, mesh: dict[str, int], *, micro_batches: int, kernel: str) -> Work:
    """Work of one device; `mesh` is the size of each axis.

    recomputed: remat "loop" repeats the forward pass of all layers, "dots" that of attention alone;
    the head is repeated when its logits come in chunks, unless the objective knows beforehand what
    each loss counts for. traffic: every residual of the forward
    pass is written and read once; per loop and micro-batch looped weights are read for the
    forward and for the backward pass (and for recomputing), their float32 gradients read and
    written; the optimizer reads and writes weights and state and reads gradients.
    """
    model, rows, tensor = config.model, config.train.batch_size, mesh["tensor"]
    counted, passes = flops.count(model), micro_batches * model.loops
    batch_devices = mesh["data"] * mesh["fsdp"]
    tokens = config.train.tokens_per_step / batch_devices
    keys = sum(min(w or model.seq_len, model.seq_len) for w in model.windows())
    once = unlooped(model)  # layers, which see whole rows
    attention = 4 * model.attention_width * (keys * model.loops + model.seq_len * once)
    head = flops.head(model) * model.read_outs()
    loops = counted.flops / 3 - head
    recomputed = {"loop": loops, "dots": attention, "none": 0.0}[model.remat]
    in_chunks = model.read_outs() * rows * model.seq_len > logit_chunk(model, rows)
    if in_chunks and not objectives.of(model).weighs_beforehand:
        recomputed += head
    copies = 2 if model.dtype == "bfloat16" else 4
    reads = 3 if model.remat == "loop" else 2
    everything = dataclasses.replace(model, remat="none", loss="END")

    def residuals(model: ModelConfig) -> int:
        return saved_residuals(model, rows, kernel, tensor, loops=1)

    of_loop = residuals(looped_alone(everything))
    of_others = residuals(everything) - of_loop
    shards = counted.parameters / mesh["fsdp"] / tensor
    by_adamw = sum(w.size for w in transformer.weights(model).values() if w.kind != "matrix")
    adamw = by_adamw / mesh["fsdp"] / tensor  # which keeps two numbers of each, not one
    return Work(
        model=tokens * counted.flops / tensor,
        recomputed=tokens * recomputed / tensor,
        newton_schulz=newton_schulz_flops(config, devices=math.prod(mesh.values())),
        traffic=2 * micro_batches * (model.loops * of_loop + of_others)
        + passes * counted.looped / tensor * (reads * copies + 2 * 4)
        + 4 * (5 * shards + 2 * adamw),
    )


def newton_schulz_flops(config: Config, *, devices: int = 1) -> float:
    """FLOPs of Muon's orthogonalisation that one device does in a step.

    A matrix of s × l, s ≤ l, takes 4 s² l + 2 s³ an iteration: its Gram matrix, the square of that,
    and the update. Matrices of one shape are dealt out to `devices`; the last rounds up.
    """
    m = config.model
    if config.optim.optimizer != "muon":
        return 0.0
    matrices = [w.shape for w in transformer.weights(m).values() if w.kind == "matrix"]
    alike = Counter((min(shape), max(shape)) for shape in matrices)
    return config.optim.newton_schulz_steps * sum(
        math.ceil(n / devices) * (4 * s * s * l + 2 * s**3)
        for (s, l), n in alike.items()  # noqa: E741
    )


def estimate(
    work: Work,
    collectives: Sequence[Collective],
    mesh: dict[str, int],
    hardware: Hardware,
    *,
    efficiency: float,
) -> StepTime:
    """Time of a step in which matrix products reach `efficiency` of the peak.

    Memory and links run at the rates of the data sheet, and communication does not overlap with
    compute: weights are gathered before the first loop and gradients reduced after the last, unless
    layers gather them.
    """
    by_axes: dict[str, float] = {}
    for collective in collectives:
        seconds = collective.bytes_sent / rate(collective, mesh, hardware)
        name = " × ".join(collective.axes)
        by_axes[name] = by_axes.get(name, 0) + seconds
    compute = work.flops / (efficiency * hardware.peak_flops)
    memory = work.traffic / hardware.memory_bandwidth
    communication = sum(by_axes.values())
    total = max(compute, memory) + communication
    return StepTime(
        compute=compute,
        memory=memory,
        communication=communication,
        by_axes=by_axes,
        utilization=work.model / (total * hardware.peak_flops),
    )


def rate(collective: Collective, mesh: dict[str, int], hardware: Hardware) -> float:
    """Bytes per second at which one device of the collective's group can send.

    Devices fill nodes in the order of the mesh, the last axis first. A ring that leaves the node
    does so once for all members of the group in it, which share its network; an all-to-all sends
    from every member to every other.
    """
    inside = members_in_node(collective.axes, mesh, hardware)
    if inside == collective.devices:
        return hardware.link
    sharing = 1 if collective.kind == "all-to-all" else inside
    return min(hardware.link, sharing * hardware.network)


def members_in_node(axes: Sequence[str], mesh: dict[str, int], hardware: Hardware) -> int:
    """How many devices of a group along `axes` are in one node."""
    inside, left = 1, hardware.per_node
    for axis, size in reversed(mesh.items()):
        here = min(size, left)
        inside *= here if axis in axes else 1
        left = max(1, left // here)
    return inside
