"""What each step was like: read one step late, checked, recorded, and printed every few steps."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np

from looped_jax.config.resolved import Config
from looped_jax.model import flops
from looped_jax.plotting import figures
from looped_jax.training.metric_log import EMA, MetricLog
from looped_jax.training.progress import Console, Throughput, memory_in_use


class NonFiniteLossError(ArithmeticError):
    """The loss or gradient of `step` is no longer a number."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        super().__init__(f"loss {loss}, gradient norm {grad_norm}")
        self.step = step


class StepLogger:
    """Takes the metrics of step t while step t + 1 runs, so that nobody waits for them."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        start: int,
        loss_ema: EMA,
        peak_flops: float,
        log: Console,
    ):
        """`peak_flops` is of all devices together; `start` is the step that the run goes on from.

        A quiet console belongs to a process that is not the first: it records nothing.
        """
        self._settings, self._print, self._start = config.train, log, start
        self._steps, self._costs = config.train.steps, flops.count(config.model)
        self._peak_flops = peak_flops
        self.loss_ema = loss_ema
        self.throughput = Throughput(start, self._steps, config.train.tokens_per_step)
        self._log = None if log.quiet else MetricLog(run_dir, start=start)
        self._pending: tuple[int, dict[str, Any], float] | None = None
        self._waited = 0.0
        self._seconds: dict[bool, list[float]] = {False: [], True: []}  # by diagnostics

    def submit(self, step: int, metrics: dict[str, Any], waited: float) -> None:
        """Read the step before, keep this one; `waited` seconds went by for its data."""
        self.flush()
        self._pending = step, metrics, waited

    def flush(self) -> None:
        """Wait for the step submitted last and record it. Raises NonFiniteLossError."""
        if self._pending is None:
            return
        (step, metrics, waited), self._pending = self._pending, None
        values = jax.tree.map(lambda v: np.asarray(v).tolist(), jax.device_get(metrics))
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise NonFiniteLossError(step, values["loss"], values["grad_norm"])
        smooth = self.loss_ema.update(values["loss"])
        rate = self.throughput.tick(step)
        seconds = self._settings.tokens_per_step / rate
        self._waited += waited
        self._seconds[diagnosed := "diagnostics" in values].append(seconds)
        utilization = rate * self._costs.flops / self._peak_flops
        self.record(
            step,
            {
                "train/loss": values["loss"],
                "train/loss_smooth": smooth,
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
            },
        )
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
                f"wait {100 * waited / seconds:.1f}% eta {self.throughput.remaining()}"
            )

    def record(self, step: int, scalars: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(step, scalars)

    def _draw(self, step: int, signals: dict[str, Any]) -> None:
        if self._log is not None:
            for name, values in signals.items():
                if isinstance(values, list):
                    self._log.draw(
                        step, name, figures.heatmap(values, title=f"{name}, step {step}")
                    )

    def summary(self) -> list[str]:
        """What the whole run spent on waiting for data, and on diagnostics."""
        plain, diagnosed = self._seconds[False], self._seconds[True]
        total = sum(plain) + sum(diagnosed)
        lines = [f"waited for data {100 * self._waited / max(total, 1e-9):.2f}% of the time"]
        if plain and diagnosed:
            extra = 100 * (statistics.median(diagnosed) / statistics.median(plain) - 1)
            lines.append(
                f"a step with diagnostics took {extra:+.1f}% time (medians of {len(diagnosed)} and "
                f"{len(plain)} steps): {extra / self._settings.diagnostics_every:+.2f}% over all"
            )
        return lines

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
