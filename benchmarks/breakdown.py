"""Where the time of a training step goes, part by part, beside a bound from measured rates.

    python -m benchmarks.breakdown --layers 4 --width 256 --loops 4 --out benchmarks/results/cpu

Three views of each part: its share of a profiler trace; what the step gains when the part is taken
out (ablation; all variants stepped in turn, medians); and its bound, the larger of its FLOPs
over the measured matrix product rate and its bytes over the measured copy rate. Bytes are the
least that has to move: every operand read and every result written once. Fusions that hold several
parts count for the part of their last operation. Leaving a part out can hide work of its neighbours
that overlapped with it, so the two times differ.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

# A CUDA graph runs many kernels under one name.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from benchmarks.roofline import Roofline, Work, measure_roofline
from looped_jax import files
from looped_jax.config.resolved import Config, ModelConfig
from looped_jax.config.settings import (
    REMATS,
    DataConfig,
    MeshConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
)
from looped_jax.model import attention_kernels, block, loss, norm, objectives, transformer
from looped_jax.plotting import figure_files, figures
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.tasks.text import Text
from looped_jax.training import optimizers, train_step
from looped_jax.training.optimizers import orthogonal_momentum

# Innermost scope first: a norm within attention is a norm.
PARTS = {
    "newton_schulz": "Newton–Schulz",
    "optimizer": "other optimizer",
    "rope": "RoPE",
    "norm": "norms",
    "mix": "attention mixing",
    "attention": "attention projections",
    "mlp": "MLP",
    "head": "head and loss",
    "loss": "head and loss",
    "embed": "embedding",
}
REST = "rest"
CONTROL = {"while", "call", "conditional", "async-start", "async-done"}  # hold other operations


# ---- lower bounds of the work of each part -----------------------------------------------------


def product(rows: int, inputs: int, outputs: int, size: int) -> Work:
    """x [rows, inputs] @ w [inputs, outputs], entries of `size` bytes. Each of the two products of
    the backward pass takes as much."""
    moved = rows * inputs + inputs * outputs + rows * outputs
    return Work(2.0 * rows * inputs * outputs, float(size * moved))


def elementwise(entries: int, passes: int, size: int) -> Work:
    return Work(0.0, float(size * passes * entries))


def work_of(config: Config, rows: int) -> dict[str, Work]:
    """Lower bound of the work of each part of one step over `rows` rows.

    Includes the recomputation of config.model.remat.

    A product runs forward, and twice backward; once more if it is recomputed. An elementwise
    function reads and writes once forward and reads twice and writes once backward.
    """
    m = config.model
    if m.attention != "full":
        raise ValueError("the breakdown counts attention=full; mla has other products")
    tokens, size = rows * m.seq_len, jnp.dtype(m.dtype).itemsize
    width, loops, kv_width = m.width, m.loops, m.kv_heads * m.head_dim
    q_width = m.attention_width
    again = 0 if m.remat == "none" else 1
    products = 3 + (1 if m.remat == "loop" else 0)
    passes = loops * m.layers

    visible = sum(  # keys that a query sees, mean over queries, sum over layers
        np.minimum(np.arange(1, m.seq_len + 1), window or m.seq_len).mean()
        for window in m.windows()
    )
    mixing = Work(4.0 * tokens * visible * q_width * loops,
                  float(size * tokens * (2 * q_width + 2 * kv_width)) * passes)  # fmt: skip
    norm_entries = tokens * (passes * (3 * width + q_width + kv_width) + loops * width)
    scored = len(m.scored_loops())
    again_in_head = scored * tokens > loss.chunk_size(m, tokens)
    head_products = 3 + (again_in_head and not objectives.of(m).weighs_beforehand)
    matrices = [
        (width, q_width), (q_width, width), *[(width, kv_width)] * 2,
        (width, 4 * width), (4 * width, width),
    ]  # fmt: skip
    looped = m.layers * sum(a * b for a, b in matrices)
    tables = 2 * m.padded_vocab * width
    ns_size = jnp.dtype(config.optim.newton_schulz_dtype).itemsize
    ns_flops = sum(
        config.optim.newton_schulz_steps * (4.0 * min(s) ** 2 * max(s) + 2.0 * min(s) ** 3)
        for s in matrices
    )
    projections = (
        2.0 * product(tokens, width, q_width, size) + 2.0 * product(tokens, width, kv_width, size)
    )  # fmt: skip
    return {
        "embedding": elementwise(tokens * width, 5, size) + elementwise(tables // 2, 1, 4),
        "attention projections": products * passes * projections,
        "attention mixing": (3 + again) * mixing,
        "MLP": products
        * passes
        * (product(tokens, width, 4 * width, size) + product(tokens, 4 * width, width, size)),
        "norms": elementwise(norm_entries, 2 * (1 + again) + 3, size),
        "RoPE": elementwise(tokens * passes * (q_width + kv_width), 2 * (2 + again), size),
        "head and loss": scored * head_products * product(tokens, width, m.padded_vocab, size),
        "Newton–Schulz": Work(m.layers * ns_flops, 2.0 * ns_size * looped),
        # Muon: read gradient, momentum, weight, write the last two; AdamW has two momenta. The norm
        # for clipping reads all gradients first.
        "other optimizer": Work(0.0, 4.0 * (6 * looped + 8 * tables)),
    }


# ---- the trace -----------------------------------------------------------------------------------


def part_of(scope: str) -> str:
    """The part that an operation belongs to, by the scopes in its name."""
    words = set(re.split(r"[/()]", scope))
    return next((part for word, part in PARTS.items() if word in words), REST)


def parts_of(program: str) -> dict[str, str]:
    """The part of every operation that does work, by its name in the compiled program's text."""
    pattern = re.compile(
        r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([\w\-]+)\((?:.*op_name=\"([^\"]*)\")?", re.M
    )
    return {
        name: part_of(scope or "")
        for name, opcode, scope in pattern.findall(program)
        if opcode not in CONTROL
    }


def seconds_by_part(events: Iterable[tuple[str, float]], parts: dict[str, str]) -> dict[str, float]:
    """Sum of (operation, seconds) by part; operations that only hold others are left out."""
    total: dict[str, float] = defaultdict(float)
    for name, seconds in events:
        if name in parts:
            total[parts[name]] += seconds
    return dict(total)


def read_trace(folder: Path, module: str) -> Iterator[tuple[str, float]]:
    """(operation, seconds) of every event of `module` in a profiler's folder."""
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats)
                    if str(stats.get("hlo_module", "")).startswith(module) and "hlo_op" in stats:
                        yield str(stats["hlo_op"]), event.duration_ns * 1e-9


# ---- steps, whole and without a part -------------------------------------------------------------


class Step:
    """The training step of `config`, compiled; with `patches` in place while it is traced."""

    def __init__(
        self,
        config: Config,
        tokens: np.ndarray,
        patches: Sequence[Any] = (),
        optimizer: optax.GradientTransformation | None = None,
    ):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        optimizer = optimizer or optimizers.make_optimizer(config, mesh, steps=100)
        self.tokens, self.seconds = tokens, []
        with contextlib.ExitStack() as patched:
            for patch in patches:
                patched.enter_context(patch)
            transformer._skeleton.cache_clear()
            self.state = train_step.create(config, optimizer, mesh)
            step = train_step.make_train_step(config, optimizer, mesh)
            self.program = step.lower(self.state, tokens).compile()
        self()
        self.seconds.clear()  # the first step is not timed

    def __call__(self) -> None:
        start = time.perf_counter()
        self.state, metrics = self.program(self.state, self.tokens)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - start)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def without(config: Config, tokens: np.ndarray) -> dict[str, Callable[[], Step]]:
    """For each part that can be taken out, how to make the step without it."""

    def step(*patches: Any, optimizer: Any = None) -> Callable[[], Step]:
        return lambda: Step(config, tokens, patches, optimizer)

    def not_mixed(model: ModelConfig, mesh: Mesh, *, training: bool) -> attention_kernels.Attend:
        def attend(query, key, value, window):
            return query + jnp.repeat(key + value, query.shape[2] // key.shape[2], axis=2)

        return attend

    def no_attention(self, query_source, source, here, view, parts):
        split = (*source.shape[:2], -1, self.head_dim)
        heads = query_source.reshape(split), *[source.reshape(split)] * 2
        return here.history.attend(*heads, self.window).reshape(query_source.shape)

    def summed(config, head, hidden, targets, weights):
        sums = hidden.astype(jnp.float32).sum((1, 2, 3))
        return weights @ sums, sums

    def unchanged(x, *_, **__):
        return x

    mixing = mock.patch.object(attention_kernels, "for_mesh", not_mixed)
    return {
        "attention mixing": step(mixing),
        "attention projections": step(mock.patch.object(block.Attention, "__call__", no_attention)),
        "MLP": step(mock.patch.object(block.MLP, "__call__", lambda self, x, *_: x)),
        "norms": step(
            mock.patch.object(block, "rms_norm", unchanged),
            mock.patch.object(norm.Norm, "__call__", lambda self, x: x),
        ),
        "RoPE": step(mock.patch.object(block, "rotate", unchanged)),
        "head and loss": step(mock.patch.object(loss, "weighted_losses", summed)),
        "Newton–Schulz": step(mock.patch.object(orthogonal_momentum, "orthogonalize", unchanged)),
        "optimizer": step(optimizer=optax.sgd(1e-6)),
    }


# ---- the breakdown -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One part: seconds by the trace (its share of the step), by leaving it out, and its bound."""

    part: str
    trace: float
    left_out: float | None
    work: Work
    bound: float

    @property
    def ratio(self) -> float:
        return self.trace / self.bound if self.bound else float("nan")


def break_down(config: Config, rows: int, rounds: int) -> tuple[float, Roofline, list[Row], float]:
    """Step seconds, the machine, a row per part, and milliseconds waited for data per step."""
    shape = (1, rows, config.model.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    log("measuring the machine ...")
    roofline = measure_roofline(config.model.dtype)
    log("compiling the whole step ...")
    whole = Step(config, tokens)
    others: dict[str, Step] = {}
    for name, make in without(config, tokens).items():
        log(f"compiling the step without {name} ...")
        others[name] = make()
    for number in range(rounds):
        log(f"round {number + 1} of {rounds}")
        for step in (whole, *others.values()):
            step()
    step_seconds = whole.median
    gained = {name: step_seconds - step.median for name, step in others.items()}
    gained["other optimizer"] = gained.pop("optimizer") - gained["Newton–Schulz"]
    parts = parts_of(whole.program.as_text())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(max(2, rounds // 2)):
                whole()
        traced = seconds_by_part(read_trace(Path(folder), "jit_step"), parts)
    total = sum(traced.values())
    if not total:
        raise SystemExit("error: the trace names no operation of the step; is another profiler on?")
    work = work_of(config, rows)
    names = list(dict.fromkeys([*work, *traced]))
    found = [
        Row(
            name,
            step_seconds * traced.get(name, 0.0) / total,
            gained.get(name),
            work.get(name, Work()),
            roofline.bound(work.get(name, Work())),
        )
        for name in names
    ]
    return step_seconds, roofline, found, wait_for_data(config, rows, whole)


def wait_for_data(config: Config, rows: int, step: Step) -> float:
    """Median milliseconds that a step waits for its batch of text, as training does."""
    waits = []
    with contextlib.closing(Text(config).train_rows(config, batch_size=rows)) as batches:
        for _ in range(8):
            start = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - start)
            step()
    return 1e3 * statistics.median(waits[2:])


def table(step_seconds: float, rows: Sequence[Row], waited: float) -> str:
    lines = [
        "| part | trace ms | left out ms | GFLOP | MB | bound ms | trace / bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        left_out = "–" if row.left_out is None else f"{1e3 * row.left_out:.1f}"
        ratio = f"{row.ratio:.2f}" if row.bound else "–"
        lines.append(
            f"| {row.part} | {1e3 * row.trace:.1f} | {left_out} | {row.work.flops / 1e9:.2f} | "
            f"{row.work.bytes / 1e6:.0f} | {1e3 * row.bound:.1f} | {ratio} |"
        )
    bound = sum(row.bound for row in rows)
    flops, moved = (sum(getattr(row.work, name) for row in rows) for name in ("flops", "bytes"))
    lines.append(
        f"| **step** | {1e3 * step_seconds:.1f} | | {flops / 1e9:.2f} | {moved / 1e6:.0f} | "
        f"{1e3 * bound:.1f} | {step_seconds / bound:.2f} |"
    )
    lines.append(f"| data wait | {waited:.2f} | | | | | |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], title: str) -> Any:
    """Bars per part: trace, leave-one-out, bound."""
    figure, axes = figures.panels(1, width=9, height=0.55 * len(rows) + 1.4)
    axis, positions = axes[0][0], np.arange(len(rows))
    for shift, label, color, values in (
        (-0.27, "trace", figures.BLUE, [row.trace for row in rows]),
        (0.0, "left out", "#8ecae6", [row.left_out or 0.0 for row in rows]),
        (0.27, "bound", figures.RED, [row.bound for row in rows]),
    ):
        axis.barh(positions + shift, 1e3 * np.array(values), 0.25, label=label, color=color)
    axis.set_yticks(positions, [row.part for row in rows])
    axis.invert_yaxis()
    axis.legend()
    figures.tidy(axis, title=title, xlabel="milliseconds of a step")
    return figure


def log(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.breakdown",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = {"layers": 4, "width": 256, "loops": 4, "seq_len": 256, "batch_size": 4}
    for name, default in {**sizes, "vocab_size": 4096, "rounds": 5}.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--variant", default="FLT")
    flags.add_argument("--data", default="builtin", help="folder of shards, for the data wait")
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags.add_argument("--remat", default="loop", choices=REMATS)
    flags.add_argument("--out", type=Path, help="folder for breakdown.json and the figure")
    args = flags.parse_args(argv)
    model = ModelSettings(
        variant=args.variant, layers=args.layers, loops=args.loops, width=args.width,
        seq_len=args.seq_len, dtype=args.dtype, remat=args.remat,
    )  # fmt: skip
    config = resolve(
        Settings(
            model=model,
            optim=OptimConfig(newton_schulz_dtype=args.dtype),
            data=DataConfig(path=args.data),
            train=TrainSettings(
                batch_size=args.batch_size, tokens_per_step=args.batch_size * args.seq_len
            ),
        ),
        vocab_size=args.vocab_size,
    )
    seconds, roofline, rows, waited = break_down(config, args.batch_size, args.rounds)
    device = jax.devices()[0].device_kind
    title = (
        f"{device}, {args.variant} L={args.layers} D={args.width} K={args.loops} T={args.seq_len} "
        f"B={args.batch_size} V={args.vocab_size} {args.dtype}, remat {args.remat}"
    )
    log(f"\n{title}; jax {jax.__version__}; measured in {args.dtype}: {roofline}\n")
    log(table(seconds, rows, waited))
    if args.out:
        record = {
            "title": title, "jax": jax.__version__, "step_seconds": seconds,
            "roofline": dataclasses.asdict(roofline), "data_wait_ms": waited,
            "parts": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip
        files.write_json(args.out / "breakdown.json", record, indent=1)
        figure_files.save(draw(rows, title), args.out / "breakdown")
        log(f"open {args.out / 'breakdown.png'}")


if __name__ == "__main__":
    main()
