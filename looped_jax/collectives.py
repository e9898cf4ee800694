"""Communication of a compiled program, read from its HLO text: what is sent, along which axis.

Works on programs compiled for fake CPU devices. The CPU compiler sends bfloat16 as float32, so the
reader is told the type of each purpose instead of believing the text.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}

_OPERATION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:to_apply|body|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Collective:
    """One kind of message along one set of mesh axes, for one purpose, over a whole step.

    axes: mesh axes that the message crosses; devices: size of one group
    calls: times a step; sent: bytes that one device sends in all of them
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    purpose: str
    calls: int
    sent: int


def read(
    program: jax.stages.Compiled, mesh: Mesh, *, widths: Mapping[str, int] | None = None
) -> list[Collective]:
    """Collectives of one run of `program`, loops counted, the largest first.

    `widths` gives the true bytes per number of a purpose: "weights", "gradients", "optimizer",
    "activations" or "other"; else the text is believed. Sent bytes are those of a ring: of an
    array of S bytes and n devices S (n − 1) / n for gather, scatter and all-to-all, twice that for
    all-reduce. Raises ValueError for a loop of unknown length around a collective.
    """
    lines, times = _computations(program.as_text() or "")
    calls: dict[tuple[str, tuple[str, ...], int, str], int] = defaultdict(int)
    sent: dict[tuple[str, tuple[str, ...], int, str], float] = defaultdict(float)
    for name, body in lines.items():
        for line in body:
            match = _OPERATION.search(line)
            axes = _axes(line, mesh) if match else ()
            if not match or not axes:  # a group of one device sends nothing
                continue
            (shapes, kind), count = match.groups(), times(name)
            devices = math.prod(mesh.shape[axis] for axis in axes)
            purpose = _purpose(line)
            size = sum(
                math.prod(map(int, filter(None, dimensions.split(","))))
                * min(WIDTHS[dtype], (widths or {}).get(purpose, 8))
                for dtype, dimensions in _ARRAY.findall(shapes)
            )
            key = (kind, axes, devices, purpose)
            calls[key] += count
            sent[key] += count * size * _ring(kind, devices)
    found = [Collective(*key, count, round(sent[key])) for key, count in calls.items()]
    return sorted(found, key=lambda c: -c.sent)


def _ring(kind: str, n: int) -> float:
    """Bytes a device sends per byte of the result."""
    share = (n - 1) / n
    return {"all-reduce": 2 * share, "reduce-scatter": n - 1, "collective-permute": 1}.get(
        kind, share
    )


def _computations(text: str) -> tuple[dict[str, list[str]], Callable[[str], int]]:
    """Lines of every computation, and a function that tells how often one runs."""
    lines: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            entry = current if header[1] else entry
            lines[current] = []
        elif current:
            lines[current].append(line)
    callers: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for name, body in lines.items():
        for line in body:
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip(" %") for branch in branches.split(",")]
            trips: float = 1
            if " while(" in line:
                known = _TRIPS.search(line)
                trips = int(known[1]) if known else math.nan
            for other in called:
                callers[other].append((name, trips))

    def times(name: str) -> int:
        count = runs(name)
        if math.isnan(count):
            raise ValueError(f"a loop of unknown length communicates, in computation {name}")
        return int(count)

    def runs(name: str) -> float:
        if name == entry:
            return 1
        return sum(trips * runs(caller) for caller, trips in callers[name])

    return lines, times


def _axes(line: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of one group differ."""

    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    lists = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]*)\}\}", line)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if lists:
        groups = np.array([numbers(group) for group in lists[1].split("},{")])
    elif iota:  # [groups, size]<=[dimensions]T(permutation)
        order = np.arange(mesh.size).reshape(numbers(iota[2]))
        order = order.transpose(numbers(iota[3])) if iota[3] else order
        groups = order.reshape(numbers(iota[1]))
    else:
        groups = np.arange(mesh.size)[None]
    places = np.unravel_index(groups, mesh.devices.shape)
    return tuple(
        axis
        for axis, place in zip(mesh.axis_names, places, strict=True)
        if (place != place[:, :1]).any()
    )


def _purpose(line: str) -> str:
    """What the message is for, from the scopes that state.py and optim.py set."""
    found = re.search(r'op_name="([^"]*)"', line)
    name = found[1] if found else ""
    if "optimizer" in name:
        return "optimizer"
    if "/while/" in name:
        return "activations"
    if "all_gather" in name:
        return "weights"
    return "gradients" if "reduce_scatter" in name or "psum" in name else "other"
