"""The paper's claim at small size: every loop rule at several loop counts, on the same tokens.

    python -m benchmarks.claim                     # 2 cores, about half an hour
    python -m benchmarks.claim --preset larger     # 2 cores, about half an hour
    python -m benchmarks.claim --preset gpu        # the paper's width, one GPU

Claim (arXiv 2605.18797): with more loops plain looping (LT), and at K = 12 also LT_i and LT_ia, end
on a plateau of the loss, with a strongly varying gradient norm and a growing norm of the residual
stream; FLT trains on.

Every finished run is one line of <out>/runs.jsonl, so a sweep that was stopped continues.
benchmarks/claim.md has the results. A run is judged by the two signs of
looped_jax/comparison/verdict.py, never by the norm of the residual stream.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import claim_figures
from benchmarks.claim_runs import Run, Setting
from looped_jax import files
from looped_jax.comparison import verdict
from looped_jax.comparison.verdict import TAIL, Verdict
from looped_jax.config.registry import LOOP_RULES
from looped_jax.config.resolved import ModelConfig
from looped_jax.config.settings import DataConfig, MeshConfig
from looped_jax.data import corpus, pipeline, tokenizer
from looped_jax.data.corpus import Corpus
from looped_jax.model import attention_kernels, flops, loss, transformer
from looped_jax.runtime import sharding
from looped_jax.runtime.compilation_cache import keep_compiled
from looped_jax.training import optimizers, train_step

NORMS_EVERY = 5  # steps between recorded norms of the residual stream


PRESETS = {
    "laptop": Setting(  # what the PyTorch reference was measured at
        layers=3, width=96, heads=2, seq_len=64, batch_size=8, steps=200, text="bytes",
        rates=(("LT", 12, 0.25), ("FLT", 12, 4.0)), equal_flops=True,
    ),
    "larger": Setting(
        layers=6, width=128, heads=2, seq_len=128, batch_size=8, steps=300, text="tokens",
        loops=(1, 12), rules=("FLT", "LT_ia", "LT_i", "LT"), seeds=(1,), equal_flops=True,
    ),
    "gpu": Setting(
        layers=6, width=384, heads=3, seq_len=1024, batch_size=32, steps=2000, text="tokens",
        loops=(1, 6, 9, 12), seeds=(1, 2, 3), equal_flops=True, dtype="bfloat16",
    ),
}  # fmt: skip


def list_runs(setting: Setting, vocab_size: int) -> list[Run]:
    """All runs of a setting, those with one loop first: the others are compared with them."""

    def runs(rule: str, loops: int, rate: float = 1.0, steps: int = setting.steps) -> list[Run]:
        return [Run(rule, loops, seed, rate, steps) for seed in setting.seeds]

    found = runs("FLT", 1)
    for k in (k for k in setting.loops if k > 1):
        for rule in setting.rules:
            found += runs(rule, k)
    for rule, k, rate in setting.rates:
        found += runs(rule, k, rate)
    if setting.equal_flops and max(setting.loops) > 1:
        flops_of = [
            flops.count(setting.config(Run("FLT", k, 0, steps=1), vocab_size).model).flops
            for k in (1, max(setting.loops))
        ]
        found += runs("FLT", 1, steps=round(setting.steps * flops_of[1] / flops_of[0]))
    return found


# ---- text ----------------------------------------------------------------------------------------


class Text:
    """The tokens of a setting: batches int32 [B, T + 1] to train on, and rows held out."""

    def __init__(self, setting: Setting):
        self._setting = setting
        data = DataConfig(path=setting.data)
        self._corpus = Corpus.open(data)
        size = setting.seq_len + 1
        if setting.text == "bytes":
            whole = _characters(self._corpus.train, setting.characters)
            held_out = _characters(self._corpus.val, 16 * size * setting.batch_size)
            self.vocab_size, self._bytes = 256, whole
            self.held_out = held_out[: len(held_out) // size * size].reshape(-1, size)
        else:
            self._tokenizer = tokenizer.load_tokenizer(data, self._corpus)
            self.vocab_size = self._tokenizer.vocab_size
            rows = pipeline.val_rows(
                self._corpus, self._tokenizer, seq_len=setting.seq_len,
                batch_size=setting.batch_size, max_tokens=2**16,
            )  # fmt: skip
            whole = [np.c_[r["inputs"], r["targets"][:, -1:]] for r in rows]
            self.held_out = np.concatenate([w[(w >= 0).all(axis=1)] for w in whole])

    def batches(self, seed: int) -> Iterator[np.ndarray]:
        """The same for every rule and loop count; bytes differ between seeds."""
        rows, size = self._setting.batch_size, self._setting.seq_len + 1
        if self._setting.text == "bytes":
            chance = np.random.default_rng(seed)
            while True:
                starts = chance.integers(0, len(self._bytes) - size + 1, rows)
                yield np.stack([self._bytes[start : start + size] for start in starts])
        yield from pipeline.train_rows(
            self._corpus, self._tokenizer, seq_len=size - 1, batch_size=rows
        )


def _characters(shards: Sequence[Path], count: int) -> np.ndarray:
    """The first `count` bytes of the shards' documents, int32."""
    groups, parts, size = corpus.RowGroups(shards), [], 0
    for i in range(len(groups)):
        for text in groups[i]:
            parts.append(np.frombuffer((text + "\n").encode("utf-8"), np.uint8))
            size += len(parts[-1])
        if size >= count:
            break
    return np.concatenate(parts)[:count].astype(np.int32)


# ---- runs ----------------------------------------------------------------------------------------


def train(setting: Setting, run: Run, text: Text, programs: dict[Any, Any]) -> dict[str, Any]:
    """Train once; the line of runs.jsonl. `programs` keeps compiled steps: seeds share them."""
    config = setting.config(run, text.vocab_size)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optimizers.make_optimizer(config, mesh, steps=run.steps)
    key = dataclasses.replace(run, seed=0)
    if key not in programs:
        programs.clear()
        programs[key] = train_step.make_train_step(config, optimizer, mesh)
    current, began, steps = train_step.create(config, optimizer, mesh), time.perf_counter(), []
    for _, tokens in zip(range(run.steps), text.batches(run.seed), strict=False):
        current, metrics = programs[key](current, tokens[None])
        steps.append({name: metrics[name] for name in ("loss", "grad_norm", "norms")})
    found = jax.device_get(steps)
    norms = np.array([step["norms"] for step in found])
    return {
        **dataclasses.asdict(run),
        "loss": _short([step["loss"] for step in found]),
        "grad_norm": _short([step["grad_norm"] for step in found]),
        "norms": [_short(row) for row in norms[NORMS_EVERY - 1 :: NORMS_EVERY]],
        "mean_norms": _short(norms.mean(axis=0)),
        "held_out": held_out(config.model, current.params, text.held_out, setting.batch_size),
        "flops": flops.count(config.model).flops * config.train.tokens_per_step * run.steps,
        "seconds": round(time.perf_counter() - began, 2),
    }


def held_out(config: ModelConfig, params: Any, rows: np.ndarray, batch_size: int) -> float:
    """Mean loss of whole batches of held-out rows, nats per token."""
    losses = []
    for at in range(0, len(rows) - batch_size + 1, batch_size):
        batch = rows[at : at + batch_size]
        losses.append(_losses(config, params, batch[:, :-1], batch[:, 1:]))
    return float(np.mean(jax.device_get(losses)))


@jax.jit(static_argnums=0)
def _losses(config: ModelConfig, params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    attend = attention_kernels.for_mesh(config, sharding.one_device())
    hidden = transformer.forward(config, params, inputs, attend=attend).hidden
    return loss.token_losses(config, params, hidden, targets).mean()


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{float(value):.5g}") for value in values]


def sweep(setting: Setting, out: Path) -> list[dict[str, Any]]:
    """Run what <out>/runs.jsonl does not have yet; all lines of this setting."""
    text = Text(setting)
    runs = list_runs(setting, text.vocab_size)
    described = json.loads(json.dumps(_comparable(setting)))
    setting_file = out / "setting.json"
    if setting_file.is_file() and json.loads(setting_file.read_text("utf-8")) != described:
        raise ValueError(f"{setting_file} is another setting's; give another --out")
    files.write_text(setting_file, json.dumps(described, indent=1))
    path = out / "runs.jsonl"
    done = {_key(line): line for line in read(path)}
    missing = [run for run in runs if _key(dataclasses.asdict(run)) not in done]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them are in {path}", flush=True)
    programs: dict[Any, Any] = {}
    work = [run.steps * run.loops for run in missing]
    began = time.perf_counter()
    for number, run in enumerate(missing):
        line = train(setting, run, text, programs)
        append(path, line)
        done[_key(line)] = line
        left = (time.perf_counter() - began) * sum(work[number + 1 :]) / sum(work[: number + 1])
        rate = f" ×{run.rate:g}" if run.rate != 1 else ""
        print(
            f"{number + 1}/{len(missing)} {run.rule} K={run.loops} seed {run.seed}{rate} "
            f"{run.steps} steps: loss {np.mean(line['loss'][-TAIL:]):.3f}, "
            f"{line['seconds']:.0f} s; about {left / 60:.0f} min left",
            flush=True,
        )
    return [done[_key(dataclasses.asdict(run))] for run in runs]


def _comparable(setting: Setting) -> dict[str, Any]:
    """The values that all runs of a file share; which runs are requested may differ."""
    values = dataclasses.asdict(setting)
    for name in ("loops", "rules", "seeds", "rates", "equal_flops"):
        del values[name]
    return values


def _key(line: dict[str, Any]) -> tuple:
    return tuple(line[field.name] for field in dataclasses.fields(Run))


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Finished runs; a last line that a kill left incomplete is dropped from the file."""
    if not path.is_file():
        return []
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        files.write_text(path, whole)
    return [json.loads(line) for line in whole.splitlines()]


# ---- verdicts ------------------------------------------------------------------------------------


def judge(line: dict[str, Any], single: dict[str, Any]) -> Verdict:
    """The verdict on a run, against the run of one loop with the same seed and number of steps."""
    one_loop = single["loss"], single["grad_norm"]
    return verdict.judge(line["loss"], line["grad_norm"], one_loop)


def judge_all(lines: list[dict[str, Any]], setting: Setting) -> list[tuple[dict, Verdict]]:
    singles = {
        line["seed"]: line
        for line in lines
        if line["loops"] == 1 and line["steps"] == setting.steps
    }
    return [
        (line, judge(line, singles[line["seed"]] if line["steps"] == setting.steps else line))
        for line in lines
    ]


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.claim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--preset", choices=PRESETS, default="laptop")
    flags.add_argument("--out", type=Path, help="benchmarks/results/claim_<preset> by default")
    flags.add_argument("--data", help="folder of parquet shards; the builtin corpus by default")
    numbers = {"loops": int, "seeds": int, "rules": str}
    for name, kind in numbers.items():
        flags.add_argument(f"--{name}", help=f"{kind.__name__} values between commas")
    for name in ("steps", "layers", "width", "heads", "seq_len", "batch_size"):
        flags.add_argument(f"--{name}", type=int, help="another value than the preset's")
    args = flags.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    out = given.pop("out", None) or Path("benchmarks/results") / f"claim_{args.preset}"
    try:
        for name in numbers.keys() & given.keys():
            given[name] = tuple(numbers[name](value) for value in given[name].split(","))
    except ValueError as error:
        flags.error(f"--{name}={given[name]}: {error}")
    setting = dataclasses.replace(PRESETS[given.pop("preset")], **given)
    if unknown := set(setting.rules) - set(LOOP_RULES):
        flags.error(f"--rules: {', '.join(sorted(unknown))}: choose from {', '.join(LOOP_RULES)}")
    if min(setting.loops) < 1 or setting.steps < 2 * TAIL:
        flags.error(f"--loops start at 1, --steps at {2 * TAIL}")
    keep_compiled()
    out.mkdir(parents=True, exist_ok=True)
    try:
        lines = sweep(setting, out)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    judged = judge_all(lines, setting)
    table = claim_figures.table(judged, reference=given.keys() <= {"loops", "rules", "seeds"}
                                and args.preset == "laptop")  # fmt: skip
    files.write_text(out / "table.md", table + "\n")
    print(table)
    torch = judge_all(read(out / "torch.jsonl"), setting)
    for name in claim_figures.draw(judged, setting, out, torch):
        print(f"open {out / name}")


if __name__ == "__main__":
    main()
