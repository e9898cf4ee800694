"""What is told of a run: the columns of the table, which way is better, and how they print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from looped_jax.experiments.comparison.run_record import RunRecord, Scores
from looped_jax.experiments.comparison.verdict import TAIL, burn_in, variation

SPIKE = 4.0  # robust deviations over the running median
WINDOW = 20  # steps of that median
HIGHER = ("accuracy", "core", "tokens/s")  # first words of what is better higher; all else: lower
FORMATS = {
    "tokens/s": ",.0f", "steps": ",.0f", "tokens": ",.0f", "FLOPs": ".3g", "seconds": ",.1f",
    "spikes": ".3g", "validation step": ",.0f", "evaluation step": ",.0f", "parameters": ",.0f",
}  # fmt: skip
Kind = Literal["score", "detail", "cost", "stability"]


@dataclass(frozen=True)
class Metric:
    """One column. loops: of a score that is not read at each run's own trained loop count."""

    name: str
    kind: Kind
    loops: int | None = None

    @property
    def title(self) -> str:
        return self.name if self.loops is None else f"{self.name} at {self.loops}"

    def text(self, value: float, like: float | None = None) -> str:
        """A value as it is printed, with as many decimals as `like` would have."""
        if not math.isfinite(value):
            return "not finite"
        size = abs(value if like is None else like)
        usual = ".2f" if self.kind == "stability" else ".4f" if size < 10 else ",.2f"
        return format(value, FORMATS.get(self.name, usual))

    @property
    def higher_is_better(self) -> bool:
        return self.name.removeprefix("evaluated ").lower().startswith(HIGHER)


def measure(
    run: RunRecord, step: int | None = None, *, loops: Sequence[int] = ()
) -> dict[Metric, float]:
    """What is known of a run after `step`, by default its last: only what was recorded is in it.

    Scores are those of the last validation and the last evaluation at or before `step`, at the
    trained loop count and at each of `loops`. Of a run that stopped, because a value was not
    finite, loss and validation are NaN from then on.
    """
    step = int(run.steps[-1]) if step is None else step
    until = run.steps <= step
    broken = run.stopped is not None and run.stopped <= step
    found = {Metric("loss", "score"): math.nan if broken else float(run.loss[until][-TAIL:].mean())}
    validated, validation = _last(run.validations, step)
    evaluated, evaluation = _last(run.evaluations, step)
    details = {
        name for name in (*validation, *evaluation) if _is_detail(name, validation, evaluation)
    }
    for prefix, scores in (("", validation), ("evaluated ", evaluation)):
        for name, of_loops in scores.items():
            kind: Kind = "detail" if name in details else "score"
            for k, value in _at(of_loops, run.config.model.loops, loops):
                known = math.nan if broken and not prefix else float(value)
                found[Metric(prefix + name, kind, k)] = known
    if validated is not None:
        found[Metric("validation step", "detail")] = float(validated)
    if evaluated is not None:
        found[Metric("evaluation step", "detail")] = float(evaluated)
    cost = {
        "tokens/s": float(np.nanmedian(run.tokens_per_second[until]))
        if np.isfinite(run.tokens_per_second[until]).any() else None,
        "steps": float(step),
        "tokens": float(run.spent("tokens")[until][-1]),
        "FLOPs": float(run.spent("flops")[until][-1]),
        "seconds": float(run.spent("seconds")[until][-1]),
    }  # fmt: skip
    found |= {Metric(name, "cost"): v for name, v in cost.items() if v is not None}
    if run.summary:
        found[Metric("parameters", "detail")] = float(run.summary["parameters"])
        found[Metric("peak MiB", "detail")] = run.summary["peak_memory_bytes"] / 2**20
    return found


def stability(run: RunRecord) -> dict[Metric, float]:
    """How calmly a run went, over all of its steps, or those before it stopped.

    residual growth: norm of the residual stream after the last loop over that after the first, mean
    of the last TAIL steps; gradient-norm CV: coefficient of variation over steps; CV per loop: that
    of the gradient arriving in each loop, mean over loops, where it was recorded; spikes: see
    `spikes`
    """
    end = len(run.steps) if run.stopped is None else int((run.steps < run.stopped).sum())
    if not end:
        return {}
    counted = slice(burn_in(end), end)
    values = {
        "gradient-norm CV": variation(run.grad_norm[counted]),
        "residual growth": float(run.residual_growth[:end][-TAIL:].mean()),
        "spikes": float(spikes(run.loss[:end])[counted].sum()),
    }
    if len(run.loop_grad_norms) > 1:
        values["CV per loop"] = variation(run.loop_grad_norms)
    return {Metric(name, "stability"): value for name, value in values.items()}


def spikes(losses: np.ndarray) -> np.ndarray:
    """Which losses [S] are spikes.

    A spike is farther above the median of the WINDOW steps before it than is usual, by SPIKE robust
    deviations (1.4826 times the median absolute deviation, and at least 0.001 nats). The first
    WINDOW steps never are.
    """
    found = np.zeros(len(losses), bool)
    if len(losses) > WINDOW:
        windows = np.lib.stride_tricks.sliding_window_view(losses[:-1], WINDOW)
        rises = losses[WINDOW:] - np.median(windows, axis=1)
        usual = np.median(rises)  # below 0 while the loss falls
        deviation = max(1.4826 * np.median(np.abs(rises - usual)), 1e-3)
        found[WINDOW:] = rises - usual > SPIKE * deviation
    return found


def _last(of_steps: Mapping[int, Scores], step: int) -> tuple[int | None, Scores]:
    """The last step up to `step` that has scores, and these."""
    known = [each for each in of_steps if 0 < each <= step]
    return (max(known), of_steps[max(known)]) if known else (None, {})


def _at(
    of_loops: Mapping[int, float], trained: int, loops: Sequence[int]
) -> Iterator[tuple[int | None, float]]:
    if trained in of_loops:
        yield None, of_loops[trained]
    for k in loops:
        if k in of_loops:
            yield k, of_loops[k]


def _is_detail(name: str, *known: Iterable[str]) -> bool:
    """Whether a score is a part of another, as accuracy_distance_3, or hellaswag of all CORE."""
    return any(
        name.lower().startswith((f"{other.lower()}_", f"{other.lower()} "))
        for names in known for other in names
    )  # fmt: skip
