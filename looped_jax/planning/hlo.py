"""A parser of compiled programs: computations, their instructions, and which of them loop.

Read from XLA's text form, of any of its compilers: CPU, GPU and TPU print types, replica groups and
loop lengths in different ways.
"""

from __future__ import annotations

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
    r"branch_computations)=\{?(%?[\w.\-$]+(?:, ?%?[\w.\-$]+)*)"
)
_LOOPED = re.compile(r"(body|condition)=%?([\w.\-$]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    arrays: (element type, sizes) of its result, one for each part of a tuple
    operands: names of instructions of the same computation; given: the text they stand in, of a
    constant its value; attributes: the rest of the line
    """

    name: str
    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    given: str
    attributes: str

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(WIDTHS[dtype] * math.prod(sizes) for dtype, sizes in self.arrays)

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
                for listed in _CALLED.findall(instruction.attributes):
                    for called in listed.split(","):
                        callers[called.strip(" %")].append((name, 1))
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

    def operand_types(self, computation: str, instruction: Instruction) -> list[str]:
        """Element types of what an instruction is given."""
        types = {other.name: other.arrays for other in self.computations[computation]}
        return [dtype for name in instruction.operands for dtype, _ in types.get(name, ())]


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
    return Instruction(name, rest[:opening], arrays, operands, given, rest[closing + 1 :])


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
