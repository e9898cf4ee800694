"""Comparison of runs by their metrics.jsonl: statistics, curves, and one page with both."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from looped_jax import files
from looped_jax.config.resolved import Config
from looped_jax.errors import DataError
from looped_jax.plotting import figures, html_report
from looped_jax.plotting.html_report import Section
from looped_jax.training.metric_log import read_log
from looped_jax.training.run_folder import read_config

BURN_IN = 20  # first steps, left out of the gradient-norm CV and the spikes
TAIL = 10  # last steps, averaged for values "at the end"
SPIKE = 4.0  # robust deviations over the running median
WINDOW = 20  # steps of that median
FILE_KEYS = {  # Summary field -> its key in comparison.json
    "residual_growth": "growth",
    "grad_norm_cv": "gradient_swings",
    "loop_grad_norm_cv": "loop_swings",
}


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote to its metrics.jsonl. S steps, K loops, N steps with diagnostics.

    steps [S]; loss [S]; grad_norm [S] before clipping; stream_norms [S, K] of the residual stream
    after each loop; loop_grad_norms [N, K] of the gradient that arrives in each loop; scores: bits
    per byte at the last validation, by loop count
    """

    name: str
    config: Config
    steps: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    stream_norms: np.ndarray
    loop_grad_norms: np.ndarray
    scores: dict[int, float]

    @property
    def residual_growth(self) -> np.ndarray:
        """Norm of the residual stream after the last loop over that after the first, [S]."""
        return self.stream_norms[:, -1] / self.stream_norms[:, 0]


@dataclass(frozen=True)
class Summary:
    """Statistics of one run.

    loss: mean of the last TAIL steps, nats; residual_growth: likewise
    grad_norm_cv: coefficient of variation (std / mean) of the gradient norm over steps
    loop_grad_norm_cv: that of the gradient arriving in each loop, mean over loops; None where it
    was not recorded
    spikes: steps whose loss is SPIKE robust deviations above the median of the steps before
    """

    steps: int
    loss: float
    residual_growth: float
    grad_norm_cv: float
    loop_grad_norm_cv: float | None
    spikes: int
    scores: dict[int, float]

    def as_json(self) -> dict[str, Any]:
        """The values by their names in comparison.json, which are older than these fields."""
        values = dataclasses.asdict(self)
        return {FILE_KEYS.get(name, name): value for name, value in values.items()}


def read(run_dir: Path) -> RunRecord:
    """Open a run folder's config.json and metrics.jsonl. Raises CheckpointError or DataError."""
    config = read_config(run_dir)
    entries = read_log(run_dir)
    steps = [e for e in entries if "train/loss" in e]
    if len(steps) < 2:
        raise DataError(f"{run_dir}/metrics.jsonl has {len(steps)} steps; train it first")
    scored: dict[int, float] = {}
    for entry in entries:
        found = {
            int(key.removeprefix("val/bpb_loops_")): value
            for key, value in entry.items()
            if key.startswith("val/bpb_loops_")
        }
        scored = found or scored
    blocks = [e["diagnostics/gradient_block"] for e in entries if "diagnostics/gradient_block" in e]
    return RunRecord(
        name=run_dir.name,
        config=config,
        steps=np.array([e["step"] for e in steps]),
        loss=np.array([e["train/loss"] for e in steps]),
        grad_norm=np.array([e["train/grad_norm"] for e in steps]),
        stream_norms=np.array([e["loop/residual_norm"] for e in steps]),
        loop_grad_norms=np.array([np.linalg.norm(block, axis=-1) for block in blocks]),
        scores=scored,
    )


def summarize(run: RunRecord) -> Summary:
    """Statistics of a run; in a short one the burn-in is half of it at most."""
    counted = run.steps > min(BURN_IN, run.steps[-1] // 2)
    by_loop = run.loop_grad_norms
    return Summary(
        steps=int(run.steps[-1]),
        loss=float(run.loss[-TAIL:].mean()),
        residual_growth=float(run.residual_growth[-TAIL:].mean()),
        grad_norm_cv=_cv(run.grad_norm[counted]),
        loop_grad_norm_cv=_cv(by_loop) if len(by_loop) > 1 else None,
        spikes=int(spikes(run.loss)[counted].sum()),
        scores=run.scores,
    )


def _cv(values: np.ndarray) -> float:
    """Coefficient of variation over the first axis, mean over the others."""
    return float((values.std(axis=0) / values.mean(axis=0)).mean())


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


def differing(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Settings other than rule, loops and folder that differ between the runs, with their values.

    They may cause any difference between the curves.
    """
    expected = {"model.variant", "model.loops", "train.run_dir", "train.eval_loops"}
    flat = [{key: repr(value) for key, value in r.config.leaves().items()} for r in runs]
    values = {key: list(dict.fromkeys(settings[key] for settings in flat)) for key in flat[0]}
    return {key: found for key, found in values.items() if len(found) > 1 and key not in expected}


# ---- the page ------------------------------------------------------------------------------------


def compare(runs: Sequence[RunRecord], out: Path) -> Path:
    """Write the page and comparison.json into `out`; the page's path."""
    summaries = {run.name: summarize(run) for run in runs}
    files.write_text(
        out / "comparison.json",
        json.dumps({name: s.as_json() for name, s in summaries.items()}, indent=1),
    )
    best = min(summaries.items(), key=lambda item: item[1].loss)
    least = min(summaries.values(), key=lambda s: s.grad_norm_cv).grad_norm_cv
    lines = [f"Lowest training loss at the end: {best[0]}, {best[1].loss:.4f} nats."]
    lines += [
        f"{name}: its gradient-norm CV is {s.grad_norm_cv / least:.1f} times the smallest of "
        "these runs."
        for name, s in summaries.items()
        if s.grad_norm_cv > 3 * least > 0
    ]
    lines += [
        f"Not only rule and loops differ: {key} is {', '.join(values)}."
        for key, values in differing(runs).items()
    ]
    sections = [
        Section(
            "In numbers",
            f"Loss and residual growth are means of the last {TAIL} steps. Residual growth: norm "
            "of the residual stream after the last loop over that after the first. CV: coefficient "
            "of variation (standard deviation over mean) over steps, of the gradient norm of all "
            "weights together and of the gradient arriving in each loop (recorded with "
            "train.diagnostics_every). Spikes: steps whose loss is "
            f"{SPIKE:g} robust deviations above the median of the {WINDOW} before.",
            table=_table(summaries),
        ),
        Section(
            "Training loss",
            "Running mean of 10 steps. The colour is the rule, darker is more loops.",
            _over_steps(runs, {"loss, nats": lambda r: figures.running_mean(r.loss)}),
            "loss",
        ),
        Section(
            "Gradient norm and residual growth",
            "Gradient norm before clipping, and the norm of the residual stream after the last "
            "loop over that after the first. A gradient norm that varies strongly often precedes a "
            "plateau of the loss; residual growth alone does not.",
            _over_steps(
                runs,
                {
                    "gradient norm": lambda r: r.grad_norm,
                    "residual growth": lambda r: r.residual_growth,
                },
                log=True,
            ),
            "gradient",
        ),
    ]  # fmt: skip
    if any(run.scores for run in runs):
        sections.append(
            Section(
                "Bits per byte at every loop count",
                "The last validation of each run, all counts from one pass; circle: the trained "
                "count.",
                _scores(runs),
                "scores",
            )
        )
    if any(len(run.loop_grad_norms) > 1 for run in runs):
        sections.append(
            Section(
                "Gradient in each loop",
                "Norm of the gradient arriving in each loop, over steps; one line per loop, dark "
                "first. Lines that cross and jump: the loops' shares of the gradient change from "
                "step to step.",
                _loop_gradients([run for run in runs if len(run.loop_grad_norms) > 1]),
                "inside",
            )
        )
    about = f"{len(runs)} runs, from their metrics.jsonl."
    return html_report.write(out, "Runs side by side", about, lines, sections)


def _table(summaries: Mapping[str, Summary]) -> str:
    counts = sorted({k for s in summaries.values() for k in s.scores})
    header = ["run", "steps", "loss", "residual growth", "gradient-norm CV", "CV per loop",
              "spikes"]  # fmt: skip
    header += [f"bits per byte at {k}" for k in counts]
    rows = []
    for name, s in summaries.items():
        loops = "not recorded" if s.loop_grad_norm_cv is None else f"{s.loop_grad_norm_cv:.2f}"
        cells = [name, str(s.steps), f"{s.loss:.4f}", f"{s.residual_growth:.2f}",
                 f"{s.grad_norm_cv:.2f}", loops, str(s.spikes)]  # fmt: skip
        cells += [f"{s.scores[k]:.4f}" if k in s.scores else "–" for k in counts]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _colors(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """A hue per rule; darker for more loops."""
    hues = ("Greens", "Reds", "Purples", "Oranges", "Blues", "Greys")
    rules = list(dict.fromkeys(run.config.model.variant for run in runs))
    most = max(run.config.model.loops for run in runs)
    return {
        run.name: figures.matplotlib.colormaps[
            hues[rules.index(run.config.model.variant) % len(hues)]
        ](0.35 + 0.6 * run.config.model.loops / most)
        for run in runs
    }


def _over_steps(runs: Sequence[RunRecord], values: Mapping[str, Any], *, log: bool = False):
    figure, axes = figures.panels(len(values), width=11 / len(values), height=4)
    colors = _colors(runs)
    for axis, (label, of) in zip(axes[0], values.items(), strict=True):
        for run in runs:
            axis.plot(run.steps, of(run), color=colors[run.name], label=run.name, linewidth=1.1)
        if log:
            axis.set_yscale("log")
        figures.tidy(axis, title=label, xlabel="step")
    axes[0][0].legend(fontsize=7)
    return figure


def _scores(runs: Sequence[RunRecord]) -> Figure:
    figure, axes = figures.panels(1, width=8, height=4)
    axis, colors = axes[0][0], _colors(runs)
    for run in runs:
        counts, trained = sorted(run.scores), run.config.model.loops
        values = [run.scores[k] for k in counts]
        axis.plot(counts, values, "o-", color=colors[run.name], label=run.name, markersize=4)
        if trained in run.scores:
            axis.plot(trained, run.scores[trained], "o", markersize=10, mfc="none",
                      color=colors[run.name])  # fmt: skip
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=7)
    figures.tidy(axis, xlabel="loops at validation", ylabel="bits per byte")
    return figure


def _loop_gradients(runs: Sequence[RunRecord]) -> Figure:
    columns = min(3, len(runs))
    figure, axes = figures.panels(columns, -(-len(runs) // columns), width=4, height=2.8)
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    for axis, run in zip(axes.flat, runs, strict=False):
        steps = np.linspace(run.steps[0], run.steps[-1], len(run.loop_grad_norms))
        for k, color in enumerate(figures.shades(run.loop_grad_norms.shape[1])):
            axis.semilogy(steps, run.loop_grad_norms[:, k], color=color, linewidth=1)
        figures.tidy(axis, title=run.name, xlabel="step")
    return figure
