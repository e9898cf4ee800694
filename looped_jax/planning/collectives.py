"""Collectives of a compiled program: kind, mesh axes, purpose, calls and bytes sent.

Of any compiler. What a step will send before it is compiled is counted in communication.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from looped_jax.planning import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind over one set of mesh axes, for one purpose, of a whole step.

    axes: mesh axes that are crossed; devices: size of one group
    calls: times a step; bytes_sent: by one device, in all calls
    depth: loops that surround it in the program
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    purpose: str
    calls: int
    bytes_sent: int
    depth: int = 0


# (kind, axes, devices, purpose, depth) -> calls and bytes of each that is alike.
Found = dict[tuple[str, tuple[str, ...], int, str, int], list[tuple[int, float]]]


def read(
    program: jax.stages.Compiled, mesh: Mesh, *, unknown_loops: bool = False
) -> list[Collective]:
    """Collectives of one run of a compiled `program`, loops counted, the largest first.

    bytes_sent is that of a ring: of an array of S bytes and n devices S (n − 1) / n for gather,
    scatter and all-to-all, twice that for all-reduce. Raises ValueError for a loop of unknown
    length around a collective, unless `unknown_loops` count once.
    """
    parsed = hlo.Program.read(program.as_text() or "")
    return of_program(parsed, mesh, unknown_loops=unknown_loops)


def of_program(parsed: hlo.Program, mesh: Mesh, *, unknown_loops: bool = False) -> list[Collective]:
    """As `read`, of a program's text that was parsed."""
    found: Found = defaultdict(list)
    chains: dict[tuple, int] = {}  # of a collective that is spread over fusions: the deepest
    for computation, instruction in parsed:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        as_written, instruction = instruction, as_scatter(parsed, computation, instruction)
        kind = instruction.opcode.removesuffix("-start")
        groups = instruction.groups(mesh.size)
        axes = axes_of(groups, mesh)
        if not axes:  # a group of one device sends nothing
            continue
        depth = parsed.depth(computation)
        if instruction.chain:
            chain = (kind, groups.tobytes(), instruction.chain, instruction.arrays)
            if depth <= chains.get(chain, -1):
                continue
            chains[chain] = depth
        count = parsed.runs(computation)
        if math.isnan(count) and unknown_loops:
            count = 1
        if math.isnan(count):
            raise ValueError(f"a loop of unknown length communicates, in computation {computation}")
        devices = math.prod(mesh.shape[axis] for axis in axes)
        unnamed = not instruction.scope and instruction is not as_written
        purpose = "gradients" if unnamed else purpose_of(instruction.scope)
        sent = bytes_sent(instruction, devices)
        key = (kind, axes, devices, purpose, depth)
        found[key].append((int(count), count * sent))
    return summed(found)


def summed(found: Found) -> list[Collective]:
    """Those that are alike as one, the largest first."""
    each = [
        Collective(*key[:4], sum(n for n, _ in parts), round(sum(s for _, s in parts)), key[4])
        for key, parts in found.items()
    ]
    return sorted(each, key=lambda c: -c.bytes_sent)


def as_scatter(
    program: hlo.Program, computation: str, instruction: hlo.Instruction
) -> hlo.Instruction:
    """A sum in one kernel with the cut of its piece as a reduce-scatter, which it is.

    A TPU's compiler writes some so. Any other instruction as it is.
    """
    if instruction.opcode != "all-reduce" or computation not in program.fused:
        return instruction
    body = program.computations[computation]
    users = [one for one in body if instruction.name in one.operands]
    if [one.opcode for one in users] != ["dynamic-slice"] or not users[0].root:
        return instruction
    return dataclasses.replace(instruction, opcode="reduce-scatter", arrays=users[0].arrays)


def bytes_sent(instruction: hlo.Instruction, devices: int) -> float:
    """Bytes that one of `devices` sends around a ring."""
    kind, arrays = instruction.opcode.removesuffix("-start"), instruction.arrays
    if instruction.opcode != kind and kind != "all-reduce":  # what goes in, what comes out
        arrays = tuple(a for a in arrays if a != ("u32", ()))  # and contexts
        arrays = arrays[len(arrays) // 2 :]
    size = sum(math.prod(sizes) * hlo.WIDTHS[dtype] for dtype, sizes in arrays)
    return size * ring(kind, devices)


def ring(kind: str, n: int) -> float:
    """Bytes a device sends per byte of the result."""
    share = (n - 1) / n
    return {"all-reduce": 2 * share, "reduce-scatter": n - 1, "collective-permute": 1}.get(
        kind, share
    )


def axes_of(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of one group differ."""
    positions = np.unravel_index(groups, mesh.devices.shape)
    return tuple(
        axis
        for axis, position in zip(mesh.axis_names, positions, strict=True)
        if (position != position[:, :1]).any()
    )


def purpose_of(scope: str) -> str:
    """What a collective is for, by the scopes that JAX and training set in its name."""
    if "optimizer" in scope:
        return "optimizer"
    if "all_gather" in scope:
        return "weights"
    if "reduce_scatter" in scope:
        return "gradients"
    if "/while/" in scope or "/micro_batch/" in scope:
        return "activations"
    return "gradients" if "psum" in scope else "other"
