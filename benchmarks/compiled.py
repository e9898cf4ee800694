"""What compilers of accelerators make of the train step: cycles by part, kernels, bytes, memory.

    python -m benchmarks.compiled --cases paper_L6,wide --targets v5e:2x4,h100:8

No such device is needed, but its compiler: pip install 'looped_jax[targets]'. A case takes one to
three minutes on two cores. Cycles are the TPU compiler's own estimates; kernels that it knows
nothing of are charged with the longer of their products at the peak and their bytes at the
bandwidth, and so is everything on a GPU. None of it is a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from looped_jax import files
from looped_jax.config import presets
from looped_jax.config.resolved import Config
from looped_jax.config.settings import Settings
from looped_jax.errors import ArgumentError, printed
from looped_jax.model import flops
from looped_jax.planning import planner, targets
from looped_jax.planning.compiled_cost import CompiledCost
from looped_jax.planning.targets import Target
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding

RESULTS = Path(__file__).parent / "results" / "compiled"
WIDE = {"model.width": 1536, "model.loops": 4, "train.tokens_per_step": 131_072}
V5E = {"mesh.fsdp": 16, "train.batch_size": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # preset and what differs from it
    "paper_L6": ("paper", {}),
    "paper_L12": ("paper", {"model.layers": 12, "train.batch_size": 4}),
    "wide": ("paper", WIDE),
    "wide_dots": ("paper", WIDE | {"model.remat": "dots", "train.batch_size": 4}),
    "1b": ("1b", {}),
    "1b_v5e": ("1b", V5E),
    "3b": ("3b", {}),
    "3b_v5e": ("3b", V5E),
    "24gb": ("24gb", {}),
    "3b_step": ("3b", {"model.gather": "step"}),
    "3b_dots": ("3b", {"model.remat": "dots"}),
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--cases", default="paper_L6", help=f"of {', '.join(CASES)}")
    flags.add_argument("--targets", default="v5e:2x4", help="as v5e:2x4,v6e:2x4,h100:8")
    flags.add_argument("--vocab_size", type=int, default=151_669)
    flags.add_argument("--out", type=Path, default=RESULTS)
    args = flags.parse_args()
    with printed():
        names = args.targets.split(",")
        for name in names:
            targets.look_for_compilers(name)
        rows = [(case, name, measure(case, name, args)) for case in args.cases.split(",")
                for name in names]  # fmt: skip
    print(as_table(rows))


def measure(case: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compile one case for one target, or read what was kept of it under the same versions.

    Results of another commit stand until their file is deleted.
    """
    path = args.out / f"{case}_{name.replace(':', '_')}.json"
    of = {"vocab_size": args.vocab_size, "jax": jax.__version__}
    if path.exists():
        kept = json.loads(path.read_text("utf-8"))
        if kept["of"] == of:
            return kept
        raise ArgumentError(
            f"{path} is of {kept['of']}, and this would be of {of}; delete it, or give another "
            "--out"
        )
    target, began = targets.find(name), time.perf_counter()
    config = config_of(case, target, args.vocab_size)
    print(f"compiling {case} for {name} ...", file=sys.stderr, flush=True)
    cost = planner.compile_for(config, target)
    print(f"compiled in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    found = {"of": of} | as_json(config, target, cost)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, found, indent=1)
    return found


def config_of(case: str, target: Target, vocab_size: int) -> Config:
    """A preset with the settings of a case; its mesh fills all devices of a target."""
    preset, changes = CASES[case]
    values = presets.make("FLT", preset)
    for key, value in changes.items():
        group, setting = key.split(".")
        values[group][setting] = value
    settings = Settings.from_dict(values)
    mesh = sharding.filled(settings.mesh, len(target.devices))
    return resolve(dataclasses.replace(settings, mesh=mesh), vocab_size=vocab_size)


def as_json(config: Config, target: Target, cost: CompiledCost) -> dict[str, Any]:
    """Costs of one device and step, with the share of the peak that useful work takes."""
    useful = flops.count(config.model).flops * config.train.tokens_per_step / len(target.devices)
    device = target.hardware
    return {
        "gib": cost.memory / 2**30,
        "temporaries_gib": cost.temporaries / 2**30,
        "gigacycles": cost.seconds * device.clock / 1e9,
        "milliseconds": 1e3 * cost.seconds,
        "utilization": useful / (cost.seconds * device.peak_flops),
        "kernels": cost.kernels,
        "gigabytes": cost.traffic / 1e9,
        "parts": {
            name: {
                "megacycles": part.seconds * device.clock / 1e6,
                "milliseconds": 1e3 * part.seconds,
                "charged": 1e3 * part.charged,
                "kernels": part.kernels,
                "gigabytes": part.traffic / 1e9,
            }
            for name, part in cost.parts.items()
        },
        "custom_calls": cost.custom_calls,
    }


def as_table(rows: list[tuple[str, str, dict[str, Any]]]) -> str:
    """One line for each case and target, and one for each of its parts."""
    lines = [
        "| case | target | part | ms | Mcycles | of it charged, ms | kernels | GB | GiB at most "
        "| % of peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, name, found in rows:
        charged = sum(part["charged"] for part in found["parts"].values())
        lines.append(
            f"| {case} | {name} | **step** | {found['milliseconds']:,.1f} "
            f"| {1e3 * found['gigacycles']:,.0f} | {charged:,.1f} | {found['kernels']:,.0f} "
            f"| {found['gigabytes']:,.0f} | {found['gib']:.2f} | {100 * found['utilization']:.1f} |"
        )
        for part, of in found["parts"].items():
            lines.append(
                f"| | | {part} | {of['milliseconds']:,.1f} | {of['megacycles']:,.0f} "
                f"| {of['charged']:,.1f} | {of['kernels']:,.0f} | {of['gigabytes']:,.0f} | | |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
