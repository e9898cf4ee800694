"""A parser of compiled programs: computations, their instructions, what they move and how often.

Read from XLA's text form, of any of its compilers: CPU, GPU and TPU print types, replica groups and
loop lengths in different ways.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

WIDTHS = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-$]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:to_apply|calls|called_computations|true_computation|false_computation|"
    r"branch_computations)=(?:\{([^}]*)\}|(%?[\w.\-$]+))"
)
_LOOPED = re.compile(r"(body|condition)=%?([\w.\-$]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CONTRACTED = re.compile(r'"?lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]')
_RUN_ITSELF = {"while", "conditional", "call"}  # call computations that are scheduled themselves
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    arrays: (element type, sizes) of its result, one for each part of a tuple
    operands: names of instructions of the same computation; given: the text they stand in, of a
    constant its value; attributes: the rest of the line; root: whether it is the result
    """

    name: str
    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    given: str
    attributes: str
    root: bool = False

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(WIDTHS[dtype] * math.prod(sizes) for dtype, sizes in self.arrays)

    @property
    def elements(self) -> int:
        """Numbers in the result."""
        return sum(math.prod(sizes) for _, sizes in self.arrays)

    @property
    def scope(self) -> str:
        """Where in the traced program it comes from, as jax.named_scope and JAX name it."""
        found = _SCOPE.search(self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""

    @property
    def chain(self) -> str | None:
        """The id shared by the fusions over which a TPU spreads one collective, else None."""
        found = _CHAIN.search(self.attributes)
        return found[1] if found else None

    @property
    def cycles(self) -> int:
        """What a TPU's compiler estimates that it takes; 0 where it does not say."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found else 0

    def groups(self, devices: int) -> np.ndarray:
        """Devices of each group of a collective, int [groups, size], by position in the mesh."""
        return _groups(self.attributes, devices)


@dataclass(frozen=True)
class Program:
    """Computations by name; `loops` are the bodies and conditions of while instructions."""

    computations: dict[str, list[Instruction]]
    entry: str
    callers: dict[str, list[tuple[str, float]]] = field(repr=False)
    loops: frozenset[str]

    @classmethod
    def read(cls, text: str) -> Program:
        """Raises ValueError for a text without an entry computation."""
        lines: dict[str, list[str]] = {}
        entry = current = ""
        for line in text.splitlines():
            if not current and (header := _HEADER.match(line)):
                current = header[2]
                entry = current if header[1] else entry
                lines[current] = []
            elif line == "}":
                current = ""
            elif current and line.startswith("  "):
                lines[current].append(line)
            elif current:  # Mosaic's kernels carry texts of several lines
                lines[current][-1] += line
        computations = {name: [_instruction(line) for line in body] for name, body in lines.items()}
        if not entry:
            raise ValueError("this is no program of XLA: it has no entry computation")
        callers: dict[str, list[tuple[str, float]]] = defaultdict(list)
        loops = set()
        for name, body in computations.items():
            for instruction in body:
                for inner in called(instruction):
                    callers[inner].append((name, 1))
                parts = dict(_LOOPED.findall(instruction.attributes))
                if instruction.opcode == "while":
                    trips = _trips(instruction, computations[parts["condition"]])
                    for part in parts.values():
                        callers[part].append((name, trips))
                        loops.add(part)
        return cls(computations, entry, dict(callers), frozenset(loops))

    def runs(self, computation: str) -> float:
        """How often a computation runs in one run of the program; NaN behind an unknown loop."""
        if computation == self.entry:
            return 1
        callers = self.callers.get(computation, ())
        return sum(trips * self.runs(caller) for caller, trips in callers)

    def depth(self, computation: str) -> int:
        """How many loops surround a computation, counting the one whose body it is."""
        inner = int(computation in self.loops)
        callers = self.callers.get(computation, ())
        return inner + max((self.depth(caller) for caller, _ in callers), default=0)

    def __iter__(self) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) for all of them."""
        for name, body in self.computations.items():
            for instruction in body:
                yield name, instruction

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Computations inside of other instructions, which are not scheduled themselves."""
        found = {
            name
            for body in self.computations.values()
            for instruction in body
            if instruction.opcode not in _RUN_ITSELF
            for name in called(instruction)
        }
        size = -1
        while size != len(found):  # and what only those call
            size = len(found)
            found |= {
                name
                for name, callers in self.callers.items()
                if all(caller in found for caller, _ in callers)
            }
        return frozenset(found)

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, Instruction]]:
        return {name: {i.name: i for i in body} for name, body in self.computations.items()}

    def callers_of(self, computation: str) -> list[Instruction]:
        """The instructions that call a computation, loops left out."""
        return [
            one
            for caller, _ in self.callers.get(computation, ())
            for one in self.computations[caller]
            if computation in called(one)
        ]

    def operands(self, computation: str, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results an instruction is given."""
        known = self._by_name[computation]
        return [known[name] for name in instruction.operands if name in known]

    def operand_types(self, computation: str, instruction: Instruction) -> list[str]:
        """Element types of what an instruction is given."""
        return [d for one in self.operands(computation, instruction) for d, _ in one.arrays]

    def traffic(self, computation: str, instruction: Instruction) -> int:
        """Bytes that an instruction reads and writes, of a slice those of the slice alone."""
        operands = self.operands(computation, instruction)
        if instruction.opcode in _SLICES:
            return 2 * instruction.size
        if instruction.opcode == "dynamic-update-slice":
            return 2 * operands[1].size
        inside = called(instruction) if instruction.opcode == "fusion" else ()
        if not inside or inside[0] not in self.computations:
            return instruction.size + sum(operand.size for operand in operands)
        body = self.computations[inside[0]]
        read = {
            int(i.given): self._read(body, i)
            for i in body
            if i.opcode == "parameter" and i.given.isdigit()
        }
        written = sum(self._written(inside[0], i) for i in body if i.root)
        return written + sum(read.get(n, operand.size) for n, operand in enumerate(operands))

    @staticmethod
    def _read(body: list[Instruction], parameter: Instruction) -> int:
        """Bytes that a fusion reads of a parameter: it computes no more than what is used."""
        users: dict[str, list[Instruction]] = defaultdict(list)
        for one in body:
            for name in dict.fromkeys(one.operands):
                users[name].append(one)

        def used(of: Instruction) -> int:
            """Elements of a result that something inside of the fusion needs."""
            found = of.elements if of.root else 0
            for user in users[of.name]:
                if user.opcode in _SLICES and user.operands[0] == of.name:
                    found += user.elements
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == of.name:
                    continue  # changed in place
                elif user.elements == of.elements and user.opcode not in ("dot", "reduce"):
                    found += used(user)
                else:
                    return of.elements
            return min(found, of.elements)

        return parameter.size * used(parameter) // max(1, parameter.elements)

    def _written(self, computation: str, result: Instruction) -> int:
        """Bytes that a fusion writes: of an array that is changed in place, the change."""
        operands = self.operands(computation, result)
        if result.opcode == "tuple":
            return sum(self._written(computation, one) for one in operands)
        if result.opcode in ("bitcast", "copy") and operands:
            return min(result.size, self._written(computation, operands[0]))
        return operands[1].size if result.opcode == "dynamic-update-slice" else result.size

    def product_flops(self, computation: str, instruction: Instruction) -> float:
        """FLOPs of the matrix products in an instruction: its own, and of what is fused into it."""
        if instruction.opcode == "fusion":
            return sum(
                self.product_flops(name, one)
                for name in called(instruction)
                for one in self.computations.get(name, ())
            )
        contracted = _CONTRACTED.search(instruction.attributes)
        operands = self.operands(computation, instruction)
        if not contracted or not operands or not operands[0].arrays:
            return 0.0
        left = operands[0].arrays[0][1]
        over = [int(n) for n in contracted[1].replace('"', "").split(",") if n]
        return 2.0 * math.prod(instruction.arrays[0][1]) * math.prod(left[n] for n in over)


def called(instruction: Instruction) -> tuple[str, ...]:
    """Names of the computations that an instruction calls, loops left out."""
    return tuple(
        name.strip(" %")
        for listed, alone in _CALLED.findall(instruction.attributes)
        for name in (listed or alone).split(",")
    )


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arrays = tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(shape)
        if dtype in WIDTHS
    )
    given = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-$]+)", given))
    name = name.strip().lstrip("%")
    root = line.lstrip().startswith("ROOT ")
    return Instruction(name, rest[:opening], arrays, operands, given, rest[closing + 1 :], root)


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"a parenthesis is never closed: {text[:80]}")


def _trips(loop: Instruction, condition: list[Instruction]) -> float:
    """Iterations of a while loop, NaN if unknown.

    They are what the compiler states, or the constant that the counter has to stay below.
    """
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    values = {i.name: i.given for i in condition if i.opcode == "constant" and i.given.isdigit()}
    if condition and condition[-1].opcode == "compare" and "LT" in condition[-1].attributes:
        for name in condition[-1].operands[1:]:
            if name in values:
                return int(values[name])
    return math.nan


def _groups(attributes: str, devices: int) -> np.ndarray:
    order = np.arange(devices)

    def sizes(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    def iota(shape: str, permutation: str | None) -> np.ndarray:
        order = np.arange(math.prod(sizes(shape))).reshape(sizes(shape))
        return order.transpose(sizes(permutation)) if permutation else order

    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]*)\}\}", attributes):
        return np.array([sizes(group) for group in found[1].split("},{")])
    # [groups, size]<=[dimensions]T(permutation)
    if found := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        return iota(found[2], found[3]).reshape(sizes(found[1]))
    # mesh['a'=4,'b'=2], device_ids=([dimensions]T(permutation)) {'a'}: groups along the named axes
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        if listed := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", found[2]):
            order = iota(listed[1], listed[2]).reshape(-1)
        order = order.reshape(tuple(axes.values()))
        along = re.findall(r"'([^']+)'", found[3])
        along_axes = [i for i, name in enumerate(axes) if name in along]
        joined = np.moveaxis(order, along_axes, range(-len(along_axes), 0))
        return joined.reshape(-1, math.prod(axes[name] for name in along))
    return order[None]
