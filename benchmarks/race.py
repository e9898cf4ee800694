"""The same training step and evaluation step in PyTorch, eager and compiled, and in looped_jax.

    python -m benchmarks.race --sizes tiny --rounds 5

All contenders are built once, each in a process of its own, then step in turn, so that a machine
that slows down slows all; the table holds medians. In one process the threads of one library, which
spin a while for more work, would slow the next. Compiled is torch.compile of forward, loss and
backward; its optimizer stays eager. Ours recomputes whole loops in the backward pass, on a CPU only
what is no product, as model.remat=auto has it there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with torch
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # else compile time is a lookup

import jax
import numpy as np
import torch

from benchmarks.roofline import measure_roofline
from looped_jax.config.resolved import Config
from looped_jax.config.settings import (
    MeshConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
)
from looped_jax.evaluation import scoring
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import optimizers, train_step
from torch_ref import config as torch_config
from torch_ref.loss import nats_and_bytes, score, token_losses
from torch_ref.model import LoopedTransformer
from torch_ref.optim import OptimConfig as TorchOptimConfig
from torch_ref.optim import Recipe

MIB = 2**20
STEPS = ("train", "evaluate")
ANSWER = "seconds "


@dataclass(frozen=True)
class Size:
    """L layers, D width, K loops, T time, B batch, V vocabulary, and the compute dtype."""

    L: int
    D: int
    K: int
    T: int
    B: int
    V: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"L={self.L} D={self.D} K={self.K} T={self.T} B={self.B} V={self.V} {self.dtype}"

    @property
    def loop_counts(self) -> tuple[int, ...]:
        """What one evaluation step scores."""
        return tuple(sorted({1, max(1, self.K // 2), self.K}))


CPU_SIZES = {"tiny": Size(2, 128, 4, 128, 32, 4096), "small": Size(4, 256, 4, 256, 4, 4096)}
GPU_SIZES = {
    "L6_K12": Size(6, 384, 12, 1024, 8, 152_064, "bfloat16"),
    "L12_K12": Size(12, 768, 12, 1024, 8, 152_064, "bfloat16"),
    "L12_K3": Size(12, 768, 3, 1024, 8, 152_064, "bfloat16"),
    "wide": Size(6, 1536, 4, 1024, 8, 152_064, "bfloat16"),
}
SIZES = CPU_SIZES | GPU_SIZES | {"toy": Size(1, 32, 2, 32, 2, 256)}  # which measures nothing


class Contender(ABC):
    """One program at one size. Both steps return when the device is done."""

    name: str

    def __init__(self, size: Size, tokens: np.ndarray):
        self.size, self.tokens = size, tokens  # tokens [B, T + 1]
        self.byte_sizes = np.full(size.V, 4, np.int32)

    @abstractmethod
    def train(self) -> None: ...

    @abstractmethod
    def evaluate(self) -> None: ...

    def program_bytes(self) -> int | None:
        """What the compiler says the training step needs, weights included; None if it does not."""
        return None


class Torch(Contender):
    name = "torch eager"
    wrap: Callable[[Any], Any] = staticmethod(lambda function: function)

    def __init__(self, size: Size, tokens: np.ndarray):
        super().__init__(size, tokens)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        heads = jax_config(size).model.heads or 1
        model = LoopedTransformer(
            torch_config.ModelConfig("FLT", size.L, size.K, size.D, heads, heads, size.T, size.V),
            getattr(torch, size.dtype),
        ).to(self.device)
        self.recipe = Recipe(
            model,
            TorchOptimConfig(steps=1000, newton_schulz_dtype=getattr(torch, size.dtype)),
        )
        self.inputs, self.targets = (
            torch.from_numpy(np.ascontiguousarray(part)).to(self.device)
            for part in (tokens[:, :-1], tokens[:, 1:])
        )
        self.lengths = torch.from_numpy(self.byte_sizes).to(self.device)

        def objective(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return score(model, inputs, targets).objective

        def nats(inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
            hidden = model(inputs, max(size.loop_counts)).hidden
            return [token_losses(model.head(hidden[k - 1]), targets) for k in size.loop_counts]

        self.objective, self.nats, self.steps = self.wrap(objective), self.wrap(nats), 0

    def train(self) -> None:
        self.objective(self.inputs, self.targets).backward()
        self.recipe.step(self.steps)
        self.steps += 1
        self._wait()

    @torch.no_grad()
    def evaluate(self) -> None:
        for nats in self.nats(self.inputs, self.targets):
            nats_and_bytes(nats, self.targets, self.lengths)
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class CompiledTorch(Torch):
    name = "torch compiled"
    wrap = staticmethod(torch.compile)


class LoopedJax(Contender):
    name = "looped_jax"

    def __init__(self, size: Size, tokens: np.ndarray):
        super().__init__(size, tokens)
        config = jax_config(size)
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        optimizer = optimizers.make_optimizer(config, steps=1000)
        self.state = train_step.create(config, optimizer, mesh)
        self.step = train_step.make_train_step(config, optimizer, mesh)
        self.score = scoring.make_score_step(config.model, mesh, size.loop_counts)

    @functools.cached_property
    def program(self) -> jax.stages.Compiled:
        return self.step.lower(self.state, self.tokens[None]).compile()

    def train(self) -> None:
        self.state, metrics = self.program(self.state, self.tokens[None])
        jax.block_until_ready((self.state, metrics))

    def evaluate(self) -> None:
        inputs, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        jax.device_get(self.score(self.state.params, inputs, targets, self.byte_sizes))

    def program_bytes(self) -> int | None:
        memory = self.program.memory_analysis()
        return memory and memory.temp_size_in_bytes + memory.argument_size_in_bytes


CONTENDERS: dict[str, type[Contender]] = {c.name: c for c in (Torch, CompiledTorch, LoopedJax)}


def jax_config(size: Size) -> Config:
    remat = "dots" if jax.default_backend() == "cpu" else "loop"
    model = ModelSettings(
        layers=size.L, loops=size.K, width=size.D, seq_len=size.T, dtype=size.dtype, remat=remat
    )
    train = TrainSettings(batch_size=size.B, steps=1000, tokens_per_step=size.B * size.T)
    recipe = OptimConfig(newton_schulz_dtype=size.dtype)
    return resolve(Settings(model=model, optim=recipe, train=train), vocab_size=size.V)


def random_tokens(size: Size) -> np.ndarray:
    return np.random.default_rng(0).integers(0, size.V, (size.B, size.T + 1), np.int32)


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


# ---- memory, in a process of its own -------------------------------------------------------------


def own_memory(contender: type[Contender], size: Size) -> dict[str, float | None]:
    """MiB at the peak of a training step, in this process, which should run nothing else.

    CUDA: what torch allocated. CPU: the growth of resident memory since before the weights were
    made, its peak over two steps after the first (compilation is over; what it left is counted).
    None where the machine does not tell.
    """
    before = resident("VmRSS")
    runner = contender(size, random_tokens(size))
    runner.train()
    said = runner.program_bytes()
    peak: float | None = None
    if isinstance(runner, Torch) and runner.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        runner.train()
        peak = torch.cuda.max_memory_allocated() / MIB
    elif jax.default_backend() == "cpu" and before is not None and forget_peak():
        runner.train()
        runner.train()
        after = resident("VmHWM")
        peak = None if after is None else after - before
    return {"peak": peak, "program": None if said is None else said / MIB}


def resident(key: str) -> float | None:
    """VmRSS (now) or VmHWM (peak) of this process in MiB; None outside Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), None)


def forget_peak() -> bool:
    """Set VmHWM back to the present; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory_of(contender: str, size: str) -> dict[str, float | None]:
    command = [sys.executable, "-m", "benchmarks.race", "--memory_of", contender, "--sizes", size]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        print(f"memory of {contender} at {size} is not known: {last}", flush=True)
        return {"peak": None, "program": None}
    return json.loads(done.stdout.splitlines()[-1])


# ---- the race ------------------------------------------------------------------------------------


class Apart(contextlib.AbstractContextManager):
    """A contender in a process of its own, which steps when it is asked to; see `serve`."""

    def __init__(self, contender: str, size: str):
        self._name = contender
        command = [sys.executable, "-m", "benchmarks.race", "--serve", contender, "--sizes", size]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, step: str) -> float:
        """What one of STEPS takes now. Raises RuntimeError where the process has ended."""
        with contextlib.suppress(BrokenPipeError):  # then it has no answer either
            print(step, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return float(line.removeprefix(ANSWER))
        raise RuntimeError(f"{self._name} ended in {step}, with status {self._process.wait()}")

    def __exit__(self, *error: object) -> None:
        self._process.communicate()  # the end of its questions ends it


def serve(contender: type[Contender], size: Size) -> None:
    """Take the steps that standard input names, a line each, and answer with their seconds."""
    runner = contender(size, random_tokens(size))
    for line in sys.stdin:
        print(f"{ANSWER}{timed(getattr(runner, line.strip()))}", flush=True)


def race(name: str, rounds: int, memory: bool) -> list[str]:
    """The table's lines for one size."""
    size = SIZES[name]
    used = {c: memory_of(c, name) if memory else {} for c in CONTENDERS}
    first: dict[str, tuple[float, float]] = {}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    with contextlib.ExitStack() as running:
        runners = {}
        for c in CONTENDERS:
            runners[c] = running.enter_context(Apart(c, name))
            first[c] = runners[c].seconds("train"), runners[c].seconds("evaluate")
            print(f"{name}: {c} ready, first step {first[c][0]:.1f} s", flush=True)
        for _ in range(rounds):
            for c, runner in runners.items():
                for step in STEPS:
                    seconds[c, step].append(runner.seconds(step))
    median = {key: statistics.median(values) for key, values in seconds.items()}
    lines = []
    for c in CONTENDERS:
        rates = (size.B * size.T / median[c, step] for step in ("train", "evaluate"))
        shares = (median[Torch.name, step] / median[c, step] for step in ("train", "evaluate"))
        mib = (used[c].get(key) for key in ("peak", "program"))
        cells = (
            *(f"{rate:,.0f}" for rate in rates),
            *(f"{share:.2f}" for share in shares),
            *(f"{s:.1f}" for s in first[c]),
            *("n/a" if m is None else f"{m:,.0f}" for m in mib),
        )
        lines.append(f"| {name} | {c} | {' | '.join(cells)} |")
    return lines


def hardware(sizes: Iterable[Size]) -> str:
    """What ran the race, with its rate in the types of `sizes`: ratios depend on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cores} CPU cores{gpu}; jax on {jax.devices()[0].device_kind}; Python "
        f"{sys.version.split()[0]}, jax {jax.__version__}, torch {torch.__version__}; "
        + "; ".join(f"{dtype}: {measure_roofline(dtype)}" for dtype in {s.dtype: 0 for s in sizes})
    )


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = GPU_SIZES if torch.cuda.is_available() else CPU_SIZES
    flags.add_argument("--sizes", default=",".join(default), help=f"some of {','.join(SIZES)}")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    flags.add_argument("--memory_of", choices=CONTENDERS, help="only this one's memory, as JSON")
    flags.add_argument("--serve", choices=CONTENDERS, help="take the steps that are asked for")
    args = flags.parse_args()
    sizes = args.sizes.split(",")
    if unknown := [name for name in sizes if name not in SIZES]:
        flags.error(f"--sizes {unknown[0]!r} is unknown; choose some of {','.join(SIZES)}")
    if args.rounds < 1:
        flags.error(f"--rounds {args.rounds} measures nothing; give at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores or 1)
    if args.memory_of:
        print(json.dumps(own_memory(CONTENDERS[args.memory_of], SIZES[sizes[0]])))
        return
    if args.serve:
        serve(CONTENDERS[args.serve], SIZES[sizes[0]])
        return
    lines = [line for name in sizes for line in race(name, args.rounds, args.memory)]
    machine = hardware(SIZES[name] for name in sizes)
    print(f"\n{machine}; medians of {args.rounds} interleaved rounds\n")
    for name in sizes:
        print(f"- {name}: {SIZES[name]}; evaluation at {SIZES[name].loop_counts} loops")
    print()
    print(
        "| size | program | train tokens/s | eval tokens/s | train ×eager | eval ×eager "
        "| first train step s | first eval step s | peak MiB | compiler says MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
