"""What each step was like: read one step late, checked, recorded, and printed every few steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from looped_jax.config.resolved import Config
from looped_jax.model import flops, loop_costs
from looped_jax.training.metric_log import EMA, EvaluationResult, MetricLog
from looped_jax.training.process_stats import ProcessStats
from looped_jax.training.progress import Console, Throughput, duration, memory_in_use
from looped_jax.training.run_meta import Scores


class NonFiniteLossError(ArithmeticError):
    """The loss or gradient of `step` is no longer a number."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        super().__init__(f"loss {loss}, gradient norm {grad_norm}")
        self.step = step


@dataclass(frozen=True)
class Submitted:
    """A step whose metrics are still on the device."""

    step: int
    metrics: dict[str, Any]
    waited: float
    epochs: float | None
    expected_loops: float
    of_rows: Mapping[str, float]


def perplexity(nats: float) -> float:
    """exp of a mean loss; infinite where no float is so large."""
    return math.exp(nats) if not nats > 709 else math.inf


class StepLogger:
    """Takes the metrics of step t while step t + 1 runs, so that nobody waits for them."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        start: int,
        loss_ema: EMA,
        seconds: float,
        flops_spent: float | None,
        peak_flops: float,
        processes: ProcessStats,
        log: Console,
    ):
        """`peak_flops` is of all devices together; `start` is the step that the run goes on from.

        The steps up to it took `seconds` and `flops_spent`, None where an older run forgot; it had
        no sampled loops. A quiet console belongs to a process that is not the
        first: it records nothing.
        """
        self._config, self._settings, self._print, self._start = config, config.train, log, start
        self._steps, self._costs = config.train.steps, flops.count(config.model)
        self._peak_flops, self._processes = peak_flops, processes
        self.loss_ema, self.seconds = loss_ema, seconds
        tokens = start * config.train.tokens_per_step
        self.flops = tokens * self._costs.flops if flops_spent is None else flops_spent
        self.epochs: float | None = None
        self.throughput = Throughput(start, self._steps, config.train.tokens_per_step)
        self._log = None if log.quiet else MetricLog(run_dir, start=start)
        self._pending: Submitted | None = None
        self._waited = 0.0
        self._seconds: dict[bool, list[float]] = {False: [], True: []}  # by diagnostics

    def submit(
        self,
        step: int,
        metrics: dict[str, Any],
        waited: float,
        epochs: float | None,
        *,
        expected_loops: float,
        of_rows: Mapping[str, float],
    ) -> None:
        """Read the step before, keep this one.

        `waited` seconds went by for its data, which with it had been read `epochs` times.
        `expected_loops` is the mean of what could be drawn for it, and `of_rows` what its task logs
        of the rows up to there.
        """
        self.flush()
        self._pending = Submitted(step, metrics, waited, epochs, expected_loops, of_rows)

    def flush(self) -> None:
        """Wait for the step submitted last and record it.

        Raises NonFiniteLossError when it has recorded such a step: the log shows where it stopped.
        """
        if gathered := self._processes.read():
            self.record(gathered.step, gathered.scalars())
            self._print(str(gathered))
        if self._pending is None:
            return
        submitted, self._pending = self._pending, None
        step, waited = submitted.step, submitted.waited
        values = jax.tree.map(lambda v: np.asarray(v).tolist(), jax.device_get(submitted.metrics))
        smooth = self.loss_ema.update(values["loss"])
        rate = self.throughput.tick(step)
        seconds = self._settings.tokens_per_step / rate
        self.seconds, self.epochs = self.seconds + seconds, submitted.epochs
        tokens = step * self._settings.tokens_per_step
        self._waited += waited
        self._processes.add(waited, seconds)
        self._seconds[diagnosed := "diagnostics" in values].append(seconds)
        flops_per_token, loops = self._costs.flops, {}
        if "loops" in values:
            spent, backward = values["loops"]["spent"], values["loops"]["backward"]
            flops_per_token = loop_costs.step_flops(self._config.model, spent, backward)
            loops = {"loop/expected": submitted.expected_loops}
            loops |= {f"loop/{name}": value for name, value in values["loops"].items()}
        self.flops += self._settings.tokens_per_step * flops_per_token
        utilization = rate * flops_per_token / self._peak_flops
        self.record(
            step,
            {
                "train/loss": values["loss"],
                "train/loss_smooth": smooth,
                "train/ppl": perplexity(values["loss"]),
                "train/objective": values["objective"],
                "train/loop_loss": values["loop_losses"],
                "train/grad_norm": values["grad_norm"],
                "train/learning_rate_multiplier": values["learning_rate_multiplier"],
                "loop/residual_norm": values["norms"],
                "speed/tokens_per_second": rate,
                "speed/flop_utilization": utilization,
                "speed/flop_utilization_reference": rate
                * self._costs.reference_flops
                / self._peak_flops,
                "speed/data_wait_seconds": waited,
                "memory/bytes": memory_in_use(),
                "total/tokens": tokens,
                "total/flops": self.flops,
                "total/seconds": self.seconds,
            }
            | loops
            | {f"scalars/{name}": value for name, value in values["scalars"].items()}
            | dict(submitted.of_rows)
            | ({} if self.epochs is None else {"total/epochs": self.epochs}),
        )
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise NonFiniteLossError(step, values["loss"], values["grad_norm"])
        if diagnosed:
            of_step = values["diagnostics"].items()
            signals = {f"diagnostics/{name}": value for name, value in of_step}
            self.record(step, signals)
            self._draw(step, signals)
        if step % self._settings.log_every == 0 or step in (self._start + 1, self._steps):
            self._print(
                f"step {step}/{self._steps} ({100 * step / self._steps:.0f}%) "
                f"loss {smooth:.4f} grad {values['grad_norm']:.3f} "
                f"{rate:,.0f} tok/s util {100 * utilization:.1f}% "
                f"wait {100 * waited / seconds:.1f}% "
                + ("" if self.epochs is None else f"epoch {self.epochs:.2f} ")
                + "".join(
                    f"{name.rpartition('/')[2]} {value:.3f} "
                    for name, value in submitted.of_rows.items()
                )
                + f"total {duration(self.seconds)} eta {self.throughput.remaining()}"
            )
            self._processes.ask(step)

    def validated(self, step: int, scores: Scores, text: str) -> None:
        """Record and tell what validation has found after `step`; no step waited for it."""
        self.record(
            step,
            {
                f"val/{metric}_loops_{k}": value
                for metric, of_loops in scores.items()
                for k, value in of_loops.items()
            },
        )
        self._print(f"step {step} validation {text}")
        self.throughput.skip()

    def evaluated(self, step: int, result: EvaluationResult) -> None:
        """Likewise what another evaluation has found."""
        if result.scalars:
            self.record(step, result.scalars)
        for line in result.lines:
            self._print(f"step {step} {line}")
        if self._log is not None:
            for name, text in result.texts.items():
                self._log.write_text(step, name, text)
        self.throughput.skip()

    def record(self, step: int, scalars: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(step, scalars)

    def _draw(self, step: int, signals: dict[str, Any]) -> None:
        if self._log is not None:
            from looped_jax.plotting import figures  # matplotlib, where something is drawn

            for name, values in signals.items():
                if isinstance(values, list):
                    self._log.draw(
                        step, name, figures.heatmap(values, title=f"{name}, step {step}")
                    )

    def tokens_per_second(self) -> float:
        """Of the median step since this start."""
        tokens = self._settings.tokens_per_step
        return statistics.median(tokens / s for s in self._seconds[False] + self._seconds[True])

    def data_wait(self) -> float:
        """The share of the steps' time since this start that was spent on waiting for data."""
        return self._waited / max(sum(self._seconds[False]) + sum(self._seconds[True]), 1e-9)

    def diagnostics_cost(self) -> float | None:
        """How much longer a step with diagnostics takes, as a share; None without such steps."""
        plain, diagnosed = self._seconds[False], self._seconds[True]
        if not (plain and diagnosed):
            return None
        return statistics.median(diagnosed) / statistics.median(plain) - 1

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
