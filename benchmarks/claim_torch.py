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
from benchmarks.claim_grid import PRESETS
from looped_jax import files
from looped_jax.config.registry import TASKS
from looped_jax.experiments.grid import Grid, Run
from torch_ref.config import ModelConfig
from torch_ref.loss import score
from torch_ref.model import LoopedTransformer
from torch_ref.optim import OptimConfig, Recipe

RUNS = (("FLT", 1), ("FLT", 12), ("FLT_res", 12), ("LT_ia", 12), ("LT_i", 12), ("LT", 3),
        ("LT", 6), ("LT", 9), ("LT", 12))  # fmt: skip


def train(run: Run) -> dict[str, Any]:
    """Train once; a line as claim.line makes it."""
    torch.manual_seed(run.seed)
    torch.set_num_threads(1)  # more of them only wait for each other at this width
    m, steps = run.config.model, run.config.train.steps
    task = TASKS["claim"](run.settings)
    model = LoopedTransformer(
        ModelConfig(
            m.variant, m.layers, m.loops, m.width, m.heads, m.kv_heads, m.seq_len, m.vocab_size
        ),
        torch.float32,
    )
    constant = OptimConfig(steps=steps, warmdown_ratio=0.0)
    recipe, began = Recipe(model, constant), time.perf_counter()
    losses, gradients, norms = [], [], []
    count, held_out = run.config.train.batch_size, []
    batches = task.train_rows(run.config, batch_size=count)
    for step in range(steps):
        rows = torch.from_numpy(next(batches)).long()
        found = score(model, rows[:, :-1], rows[:, 1:])
        found.objective.backward()
        gradients.append(float(recipe.step(step).grad_norm))
        losses.append(found.objective.item())
        norms.append([norm.item() for norm in found.norms])
    held = task.held_out()
    with torch.no_grad():
        for at in range(0, len(held), count):
            rows = torch.from_numpy(held[at : at + count]).long()
            held_out.append(float(score(model, rows[:, :-1], rows[:, 1:]).objective))
    return {
        **{"rule": m.variant, "loops": m.loops, "seed": run.seed, "rate": 1.0, "steps": steps},
        "loss": losses,
        "grad_norm": gradients,
        "mean_norms": [sum(loop) / len(norms) for loop in zip(*norms, strict=True)],
        "held_out": sum(held_out) / len(held_out),
        "seconds": round(time.perf_counter() - began, 2),
    }


def table(ours: claim_figures.Judged, theirs: claim_figures.Judged) -> str:
    """The rows of claim_figures.table, each followed by the same runs in PyTorch."""
    by_run = {claim.key(line): (line, verdict) for line, verdict in theirs}
    shared = [(line, verdict) for line, verdict in ours if claim.key(line) in by_run]
    rows = zip(
        claim_figures.table(shared, reference=False).splitlines(),
        claim_figures.table(
            [by_run[claim.key(line)] for line, _ in shared], reference=False
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
    seeds, path = tuple(int(seed) for seed in args.seeds.split(",")), args.out / "torch.jsonl"
    setting = dataclasses.replace(PRESETS["laptop"], seeds=seeds, rates=(), equal_flops=False)
    done = {claim.key(line): line for line in claim.read(path)}
    for run in Grid.from_dict(setting.grid()).runs(Path("runs/claim_torch")):
        of_run = run.config.model.variant, run.config.model.loops
        key = (*of_run, run.seed, 1.0, run.config.train.steps)
        if of_run in RUNS and key not in done:
            done[key] = line = train(run)
            files.write_text(path, "".join(files.to_json(each) + "\n" for each in done.values()))
            print(f"{run.name}: {line['seconds']:.0f} s", flush=True)
    ours = claim.judge_all(claim.read(args.out / "runs.jsonl"), setting)
    found = table(ours, claim.judge_all(list(done.values()), setting))
    files.write_text(args.out / "torch.md", found + "\n")
    print(found)


if __name__ == "__main__":
    main()
