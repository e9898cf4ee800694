"""The claim's runs in PyTorch, on the same tokens: does the same setting give the same picture?

    python -m benchmarks.claim_torch            # after python -m benchmarks.claim

Trains torch_ref, from its own random weights, at the laptop preset, and prints a row per run of
both programs under the same verdict. Adds to <out>/torch.jsonl what it does not have yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import claim, claim_figures
from benchmarks.claim import Text
from benchmarks.claim_runs import Run, Setting
from looped_jax import files
from torch_ref.config import ModelConfig
from torch_ref.loss import score
from torch_ref.model import LoopedTransformer
from torch_ref.optim import OptimConfig, Recipe

RUNS = (("FLT", 1), ("FLT", 12), ("FLT_res", 12), ("LT_ia", 12), ("LT_i", 12), ("LT", 3),
        ("LT", 6), ("LT", 9), ("LT", 12))  # fmt: skip


def train(setting: Setting, run: Run, text: Text) -> dict[str, Any]:
    """Train once; a line as claim.train makes it."""
    torch.manual_seed(run.seed)
    torch.set_num_threads(1)  # more of them only wait for each other at this width
    heads = setting.heads
    model = LoopedTransformer(
        ModelConfig(
            run.rule, setting.layers, run.loops, setting.width, heads, heads, setting.seq_len,
            text.vocab_size,
        ),
        torch.float32,
    )  # fmt: skip
    constant = OptimConfig(steps=run.steps, warmdown_ratio=0.0)
    recipe, began = Recipe(model, constant), time.perf_counter()
    losses, gradients, norms = [], [], []
    for step, tokens in zip(range(run.steps), text.batches(run.seed), strict=False):
        rows = torch.from_numpy(tokens).long()
        found = score(model, rows[:, :-1], rows[:, 1:])
        found.objective.backward()
        gradients.append(float(recipe.step(step).grad_norm))
        losses.append(found.objective.item())
        norms.append([norm.item() for norm in found.norms])
    count, held_out = setting.batch_size, []
    with torch.no_grad():
        for at in range(0, len(text.held_out) - count + 1, count):
            rows = torch.from_numpy(text.held_out[at : at + count]).long()
            held_out.append(float(score(model, rows[:, :-1], rows[:, 1:]).objective))
    return {
        **dataclasses.asdict(run),
        "loss": losses,
        "grad_norm": gradients,
        "mean_norms": [sum(loop) / len(norms) for loop in zip(*norms, strict=True)],
        "held_out": sum(held_out) / len(held_out),
        "seconds": round(time.perf_counter() - began, 2),
    }


def table(ours: claim_figures.Judged, theirs: claim_figures.Judged) -> str:
    """The rows of claim_figures.table, each followed by the same runs in PyTorch."""
    by_run = {claim._key(line): (line, verdict) for line, verdict in theirs}
    shared = [(line, verdict) for line, verdict in ours if claim._key(line) in by_run]
    rows = zip(
        claim_figures.table(shared, reference=False).splitlines(),
        claim_figures.table(
            [by_run[claim._key(line)] for line, _ in shared], reference=False
        ).splitlines(),
        strict=True,
    )
    (head, _), (rule, _), *pairs = rows
    lines = [head, rule]
    for mine, other in pairs:
        lines += [mine, "| *PyTorch* |" + other.split("|", 2)[2]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", type=Path, default=Path("benchmarks/results/claim_laptop"))
    flags.add_argument("--seeds", default="1")
    args = flags.parse_args(argv)
    setting, seeds = claim.PRESETS["laptop"], [int(seed) for seed in args.seeds.split(",")]
    text, path = Text(setting), args.out / "torch.jsonl"
    done = {claim._key(line): line for line in claim.read(path)}
    for rule, loops in RUNS:
        for seed in seeds:
            run = Run(rule, loops, seed, steps=setting.steps)
            key = claim._key(dataclasses.asdict(run))
            if key not in done:
                line = train(setting, run, text)
                claim.append(path, line)
                done[key] = line
                print(f"{rule} K={loops} seed {seed}: {line['seconds']:.0f} s", flush=True)
    ours = claim.judge_all(claim.read(args.out / "runs.jsonl"), setting)
    found = table(ours, claim.judge_all(list(done.values()), setting))
    files.write_text(args.out / "torch.md", found + "\n")
    print(found)


if __name__ == "__main__":
    main()
