"""What a compiler for an accelerator says of a train step: cycles by part, kernels, bytes, memory.

A TPU's compiler estimates cycles for all that it schedules itself and none for kernels written by
hand, which would so seem to be free: those are charged here with the longer of their products at
the peak and their bytes at the bandwidth. A GPU's compiler estimates nothing: every kernel is
charged like that. Both are least times, not measurements.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh

from looped_jax.config.resolved import ModelConfig
from looped_jax.model import attention_kernels
from looped_jax.planning import collectives, step_time
from looped_jax.planning.collectives import Collective
from looped_jax.planning.hlo import Instruction, Program, called
from looped_jax.runtime.hardware import Hardware

PARTS = (
    "loop, forward", "loop, backward", "attention kernels", "head and loss",
    "rest of a micro-batch", "optimizer", "collectives in the open",
)  # fmt: skip
# Neither computed nor moved: names for what is there already, or for room.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "partition-id", "replica-id", "after-all", "optimization-barrier",
}  # fmt: skip
_FREE_TARGETS = {
    "AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone",
    "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked",
}  # fmt: skip
_HEAD = re.compile(r"[/(](head|loss)[/)]")


@dataclass
class Part:
    """A part of the step, on one device and in one step.

    seconds: as the compiler estimates, or charged; charged: the share of it that was charged
    kernels: programs started; traffic: bytes that they read and write
    """

    seconds: float = 0.0
    charged: float = 0.0
    kernels: float = 0.0
    traffic: float = 0.0


@dataclass(frozen=True)
class CompiledCost:
    """One device's costs of one step, as compiled.

    memory: bytes at the most; temporaries: those that are no arguments
    parts: by PARTS; custom_calls: times a step, by name; unknown: those of them whose products are
    not known, and which are charged with their bytes alone
    """

    memory: int
    temporaries: int
    parts: dict[str, Part]
    custom_calls: dict[str, float]
    unknown: tuple[str, ...]
    collectives: list[Collective] = field(repr=False)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts.values())

    @property
    def kernels(self) -> float:
        return sum(part.kernels for part in self.parts.values())

    @property
    def traffic(self) -> float:
        return sum(part.traffic for part in self.parts.values())


def read(
    compiled: jax.stages.Compiled, mesh: Mesh, hardware: Hardware, model: ModelConfig
) -> CompiledCost:
    """Costs of a compiled train step of `model`.

    Raises ValueError for a loop of unknown length.
    """
    analysis = compiled.memory_analysis()
    assert analysis is not None  # every compiler has one
    program = Program.read(compiled.as_text() or "")
    parts, calls = of_program(program, mesh, hardware, model)
    return CompiledCost(
        memory=analysis.peak_memory_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        parts=parts,
        custom_calls=dict(calls),
        unknown=tuple(sorted(unknown_kernels(program))),
        collectives=collectives.read(compiled, mesh),
    )


def of_program(
    program: Program, mesh: Mesh, hardware: Hardware, model: ModelConfig
) -> tuple[dict[str, Part], dict[str, float]]:
    """Costs by part, and how often each custom call runs; see `read`."""
    parts: dict[str, Part] = {name: Part() for name in PARTS}
    calls: dict[str, float] = defaultdict(float)
    for name, body in program.computations.items():
        if name in program.fused or not (runs := program.runs(name)):
            continue
        if math.isnan(runs):
            raise ValueError(f"a loop of unknown length runs computation {name}")
        usual = _usual_part(body)
        now, free = 0.0, 0.0  # seconds since it began, and when its links have sent what they have
        since: dict[str, float] = {}  # when a collective under way has arrived
        in_the_open = parts["collectives in the open"]
        for instruction in body:
            if instruction.opcode in _FREE or instruction.target in _FREE_TARGETS:
                continue
            kind, _, half = instruction.opcode.rpartition("-")
            if (kind if half == "start" else instruction.opcode) in collectives.KINDS:
                in_the_open.kernels += runs
                free = max(free, now) + _sending(instruction, mesh, hardware)
                since[instruction.name] = free
            waits = instruction.operands if half == "done" else (instruction.name,)
            if half != "start":  # for what the work since has not hidden
                for name_of_start in waits:
                    waited = max(0.0, since.pop(name_of_start, 0.0) - now)
                    in_the_open.seconds += runs * waited
                    now += waited
            if half in ("start", "done") or instruction.opcode in collectives.KINDS:
                continue  # memory is moved ahead of its use, beside other work
            for held in _held(program, instruction):
                free = max(free, now) + _sending(held, mesh, hardware)
                in_the_open.seconds += runs * (free - now)
                now = free
            cost = _cost(program, name, instruction, hardware, model)
            part = parts[_part(instruction) or usual]
            part.seconds += runs * cost.seconds
            part.charged += runs * cost.charged
            part.kernels += runs
            part.traffic += runs * cost.traffic
            now += cost.seconds
            if instruction.opcode == "custom-call":
                calls[re.sub(r"[.\d]+$", "", instruction.name)] += runs
    parts["collectives in the open"].seconds += _spread(program, mesh, hardware)
    return parts, calls


def _cost(
    program: Program,
    computation: str,
    instruction: Instruction,
    hardware: Hardware,
    model: ModelConfig,
) -> Part:
    """Of one run of one instruction."""
    moved = program.traffic(computation, instruction)
    if hardware.clock and (instruction.cycles or instruction.opcode != "custom-call"):
        return Part(seconds=instruction.cycles / hardware.clock, traffic=moved)
    flops = _kernel_flops(program, computation, instruction, model)
    least = max(flops / hardware.peak_flops, moved / hardware.memory_bandwidth)
    return Part(seconds=least, charged=least, traffic=moved)


def _held(program: Program, instruction: Instruction) -> Iterator[Instruction]:
    """Collectives inside of a kernel, which ends when they have; those of `_spread` left out."""
    if instruction.opcode == "fusion":
        for name in called(instruction):
            for one in program.computations.get(name, ()):
                if one.opcode in collectives.KINDS and not one.chain:
                    yield collectives.as_scatter(program, name, one)


def _spread(program: Program, mesh: Mesh, hardware: Hardware) -> float:
    """Seconds of collectives that a TPU spreads over fusions, beyond those of these fusions."""
    work: dict[tuple[str, str], float] = defaultdict(float)
    sending: dict[tuple[str, str], float] = {}
    for name, instruction in program:
        if instruction.opcode not in collectives.KINDS or not instruction.chain:
            continue
        chain = (instruction.opcode, instruction.chain)
        runs, sent = program.runs(name), collectives.as_scatter(program, name, instruction)
        sending[chain] = max(sending.get(chain, 0.0), runs * _sending(sent, mesh, hardware))
        fusions = program.callers_of(name)
        work[chain] += runs * sum(one.cycles for one in fusions) / (hardware.clock or math.inf)
    return sum(max(0.0, seconds - work[chain]) for chain, seconds in sending.items())


def _sending(instruction: Instruction, mesh: Mesh, hardware: Hardware) -> float:
    """Seconds that one device sends for a collective, over the links that it crosses."""
    groups = instruction.groups(mesh.size)
    devices, axes = groups.shape[-1], collectives.axes_of(groups, mesh)
    if not axes:
        return 0.0
    kind = instruction.opcode.removesuffix("-start")
    sent = collectives.bytes_sent(instruction, devices)
    crossed = Collective(kind, axes, devices, "", 1, round(sent))
    return sent / step_time.rate(crossed, dict(mesh.shape), hardware)


def unknown_kernels(program: Program) -> set[str]:
    """Names of kernels written by hand whose products are not known."""
    return {
        _kernel_name(one)
        for _, one in program
        if one.target == "tpu_custom_call" or one.target.startswith("__cudnn")
        if _kernel_name(one) not in attention_kernels.PRODUCTS
    }


def _usual_part(body: list[Instruction]) -> str:
    """Where most of a computation's cycles belong: for instructions that do not say."""
    found: dict[str, float] = defaultdict(float)
    for instruction in body:
        if part := _part(instruction):
            found[part] += 1 + instruction.cycles
    return max(found, key=lambda part: found[part], default="rest of a micro-batch")


def _part(instruction: Instruction) -> str | None:
    """The part that an instruction's scope says; None where it has none."""
    scope = instruction.scope
    if not scope or "dynamic_update_index" in scope:
        return None  # or keeps what the computation makes
    if "splash" in instruction.name or instruction.target.startswith("__cudnn$fmha"):
        return "attention kernels"
    if "/optimizer" in scope:
        return "optimizer"
    if _HEAD.search(scope):
        return "head and loss"
    outside, within, inside = scope.partition("/micro_batch/")
    if "while/body" not in inside:
        # A sum over micro-batches, or what all loops have alike, which has lost where it was.
        of_them = within or "while/body" in outside or re.search(r"/layer_\d", outside)
        return "rest of a micro-batch" if of_them else "optimizer"
    return "loop, backward" if "transpose(" in scope else "loop, forward"


def _kernel_flops(
    program: Program, computation: str, instruction: Instruction, model: ModelConfig
) -> float:
    """FLOPs of the products in one kernel; 0 for one that is not known."""
    if instruction.opcode != "custom-call":
        return program.product_flops(computation, instruction)
    target = instruction.target
    if target.startswith(("__cublas", "__triton")):
        return program.product_flops(computation, instruction)
    products = attention_kernels.PRODUCTS.get(_kernel_name(instruction))
    if products is None:
        return 0.0
    given = program.operands(computation, instruction)
    query = next(
        sizes
        for one in given
        for _, sizes in one.arrays
        if len(sizes) == 4 or (len(sizes) == 3 and sizes[1] == model.seq_len)  # of a single row
    )
    layer = re.search(r"layer_(\d+)", instruction.scope)
    window = model.windows()[int(layer[1])] if layer else None
    rows_heads = math.prod(query) // (model.seq_len * query[-1])
    pairs = attention_kernels.pairs(model.seq_len, window, tiled=target == "tpu_custom_call")
    return products * 2.0 * rows_heads * pairs * query[-1]


def _kernel_name(instruction: Instruction) -> str:
    named = instruction.target if instruction.target.startswith("__") else instruction.name
    return re.sub(r"(_(no_)?residuals)?[.\d]*$", "", named)
