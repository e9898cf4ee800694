"""What a run comes to when it is complete: <run>/summary.json, and the same for the console."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from looped_jax import files
from looped_jax.config.resolved import Config
from looped_jax.model import flops
from looped_jax.model.attention_kernels import Choice
from looped_jax.training.progress import duration, memory_in_use
from looped_jax.training.run_meta import RunMeta
from looped_jax.training.step_logger import StepLogger

NAME = "summary.json"
SHOWN = 3  # metrics on the console; the file has all


@dataclass(frozen=True)
class Summary:
    """A complete run in numbers.

    metric: what checkpoints are judged by, the first that validation gives; lower is better
    best, best_step: its lowest value at the trained loop count, and after which step that was;
    None where it is not known
    scores: of the last validation, metric -> loop count -> value
    tokens, flops, seconds: of all steps, over all resumes; seconds without compiling, scoring and
    saving; flops count every loop, and nothing that is computed twice to save memory
    epochs: how often the training data were read; None where the task has no end of it
    tokens_per_second: of the median step since the run was last started
    data_wait: share of these steps' time that was spent on waiting for data
    diagnostics_cost: how much longer a step with diagnostics took, as a share; None without them
    peak_memory_bytes: of the first device, of the process on a CPU
    kernel: what computed attention, and why it was not the fast one
    """

    run: str
    steps: int
    parameters: int
    metric: str
    best: float | None
    best_step: int | None
    scores: dict[str, dict[int, float]]
    tokens: int
    flops: float
    seconds: float
    epochs: float | None
    tokens_per_second: float
    data_wait: float
    diagnostics_cost: float | None
    peak_memory_bytes: int
    kernel: str
    devices: str

    def __str__(self) -> str:
        last = (
            f"{metric} " + ", ".join(f"{value:.4f} at {k}" for k, value in of_loops.items())
            for metric, of_loops in list(self.scores.items())[:SHOWN]
        )
        where = "" if self.best_step is None else f" after step {self.best_step}"
        best = "not known" if self.best is None else f"{self.metric} {self.best:.4f}{where}"
        epochs = "" if self.epochs is None else f", {self.epochs:.2f} epochs"
        diagnostics = (
            ""
            if self.diagnostics_cost is None
            else f"; with diagnostics a step took {100 * self.diagnostics_cost:+.1f}%"
        )
        rows = {
            "run": f"{self.run}, {self.steps} steps, {self.parameters:,} parameters",
            "best": best,
            "last, by loops": "; ".join(last),
            "training": f"{self.tokens:,} tokens{epochs}, {self.flops:.3g} FLOPs, "
            f"{duration(self.seconds)}",
            "speed": f"{self.tokens_per_second:,.0f} tok/s (median), "
            f"{100 * self.data_wait:.2f}% of the time waiting for data{diagnostics}",
            "peak memory": f"{self.peak_memory_bytes / 2**20:,.1f} MiB",
            "kernel": self.kernel,
            "devices": self.devices,
        }
        width = max(map(len, rows))
        return "\n".join(["summary", *(f"  {name:<{width}}  {v}" for name, v in rows.items())])

    def write(self, run_dir: Path) -> None:
        """As JSON, null for what is not finite; the file is whole or as it was."""
        files.write_json(run_dir / NAME, dataclasses.asdict(self), indent=1)


def of(
    config: Config, meta: RunMeta, step_logger: StepLogger, mesh: Mesh, kernel: Choice
) -> Summary:
    """The summary of the run whose last checkpoint knows `meta`."""
    costs, tokens = flops.count(config.model), meta.step * config.train.tokens_per_step
    return Summary(
        run=config.train.run_dir,
        steps=meta.step,
        parameters=costs.parameters,
        metric=next(iter(meta.scores)),
        best=meta.best,
        best_step=meta.best_step,
        scores=meta.scores,
        tokens=tokens,
        flops=step_logger.flops,
        seconds=meta.seconds,
        epochs=step_logger.epochs,
        tokens_per_second=step_logger.tokens_per_second(),
        data_wait=step_logger.data_wait(),
        diagnostics_cost=step_logger.diagnostics_cost(),
        peak_memory_bytes=memory_in_use(),
        kernel=str(kernel).removeprefix("attention: "),
        devices=f"{mesh.size} {jax.devices()[0].device_kind}",
    )
