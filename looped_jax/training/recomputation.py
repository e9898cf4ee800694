"""model.remat=auto: as little recomputation as a device's memory allows, asked of its compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax

from looped_jax.config.resolved import Config
from looped_jax.runtime import distributed, hardware

AUTO = "auto"
ORDER = ("none", "dots", "loop")  # from most to least memory
USABLE = 0.9  # share of a device's memory for a step's own; the rest: what runs beside it, gaps
GIB = 2**30

Programs = dict[bool, jax.stages.Compiled]  # the step, with diagnostics or without


class Chosen(NamedTuple):
    """The config with what was chosen for model.remat, its programs, and what to tell of it."""

    config: Config
    programs: Programs
    told: str | None


def least(
    config: Config, compiled: Callable[[Config], Programs], limit: int | None = None
) -> Chosen:
    """The programs of `config`; with remat "auto", those that recompute least within the memory.

    `limit`: bytes of a device, by default what the processes' devices say. CPUs say nothing, and
    take "dots", which is fastest there: the rest is no slower to compute than to write and read.
    Others that say nothing take "loop". Where not even "loop" fits, it is what is taken. `compiled`
    may raise what a compiler raises that is short of memory.
    """
    if config.model.remat != AUTO:
        return Chosen(config, compiled(config), None)
    limit = limit or smallest_memory()
    if limit is None:
        on_cpu = jax.default_backend() == "cpu"
        config = _with(config, "dots" if on_cpu else "loop")
        why = "fastest on a CPU" if on_cpu else "since no device says how much memory it has"
        told = f"model.remat=auto: {config.model.remat}, {why}"
        return Chosen(config, compiled(config), told)
    too_big: list[str] = []
    for remat in ORDER:
        trial = _with(config, remat)
        programs: Programs = {}
        try:
            programs = compiled(trial)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or remat == ORDER[-1]:
                raise
        # All processes have to choose alike, whatever each one's compiler says.
        every = distributed.gather_json(most_memory(programs.values()))
        held = max(every)
        if 0 not in every and held <= USABLE * limit or remat == ORDER[-1]:
            break
        if 0 not in every:
            too_big.append(f"{remat} would take {held / GIB:.2f}")
        else:
            too_big.append(f"{remat} " + ("does not say" if programs else "does not compile"))
    but = f" ({', '.join(too_big)})" if too_big else ""
    told = f"model.remat=auto: {remat}, {held / GIB:.2f} of {limit / GIB:.2f} GiB{but}"
    return Chosen(trial, programs, told)


def smallest_memory() -> int | None:
    """Bytes of the device that has least, of all processes; None where one does not say."""
    limits = distributed.gather_json(hardware.memory_limit(jax.local_devices()[0]))
    return None if None in limits else min(limits)


def most_memory(programs: Iterable[jax.stages.Compiled]) -> int:
    """Bytes on one device at the most, of the program that takes most; 0 where nobody knows."""
    found = [program.memory_analysis() for program in programs]
    return max((analysis.peak_memory_in_bytes for analysis in found if analysis), default=0)


def _with(config: Config, remat: str) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
