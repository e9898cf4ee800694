"""Runs side by side: what they recorded, in numbers, in curves and on one page."""

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
from looped_jax.config import Config
from looped_jax.errors import CheckpointError, ConfigError, DataError
from looped_jax.plotting import figures, html_report
from looped_jax.plotting.html_report import Section
from looped_jax.training.metric_log import read_log

SETTLED = 20  # steps at the start that no statistic counts
LAST = 10  # steps averaged for values "at the end"
SPIKE = 4.0  # robust deviations over the running median
BEFORE = 20  # steps of that median


@dataclass(frozen=True)
class Recorded:
    """One run's own record. S steps, K loops, L layers.

    steps [S]; loss, gradient [S]; norms [S, K] of the stream after each loop; inside [N, K] norm of
    the gradient arriving in each loop, at the steps that looked inside; scores: bits per byte at
    the last validation, by loop count
    """

    name: str
    config: Config
    steps: np.ndarray
    loss: np.ndarray
    gradient: np.ndarray
    norms: np.ndarray
    inside: np.ndarray
    scores: dict[int, float]

    @property
    def growth(self) -> np.ndarray:
        """Norm after the last loop over that after the first, [S]."""
        return self.norms[:, -1] / self.norms[:, 0]


@dataclass(frozen=True)
class Summary:
    """A run in numbers.

    loss: mean of the last steps, nats; growth: of the stream's norm over the loops, likewise
    gradient_swings: std over mean of the gradient norm; loop_swings: the same of the gradient
    arriving in each loop, mean over loops, None where it was not recorded
    spikes: steps whose loss stands SPIKE robust deviations above the median of the steps before
    """

    steps: int
    loss: float
    growth: float
    gradient_swings: float
    loop_swings: float | None
    spikes: int
    scores: dict[int, float]


def read(run_dir: Path) -> Recorded:
    """Open a run folder's config.json and metrics.jsonl. Raises CheckpointError or DataError."""
    try:
        config = Config.from_dict(json.loads((run_dir / "config.json").read_text("utf-8")))
    except OSError as error:
        raise CheckpointError(
            f"{run_dir} is no run folder (config.json is missing); give one, as runs/check/FLT_K4"
        ) from error
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{run_dir} is damaged: config.json: {error}") from error
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
    blocks = [e["inside/gradient_block"] for e in entries if "inside/gradient_block" in e]
    return Recorded(
        name=run_dir.name,
        config=config,
        steps=np.array([e["step"] for e in steps]),
        loss=np.array([e["train/loss"] for e in steps]),
        gradient=np.array([e["train/grad_norm"] for e in steps]),
        norms=np.array([e["loop/stream_norm"] for e in steps]),
        inside=np.array([np.linalg.norm(block, axis=-1) for block in blocks]),
        scores=scored,
    )


def summarise(run: Recorded) -> Summary:
    settled = run.steps > min(SETTLED, run.steps[-1] // 2)
    loops = run.inside.std(axis=0) / run.inside.mean(axis=0) if len(run.inside) > 1 else None
    return Summary(
        steps=int(run.steps[-1]),
        loss=float(run.loss[-LAST:].mean()),
        growth=float(run.growth[-LAST:].mean()),
        gradient_swings=float(run.gradient[settled].std() / run.gradient[settled].mean()),
        loop_swings=None if loops is None else float(loops.mean()),
        spikes=int(spikes(run.loss)[settled].sum()),
        scores=run.scores,
    )


def spikes(losses: np.ndarray) -> np.ndarray:
    """Which losses [S] are spikes: farther over the median of the BEFORE steps before them than is
    usual, by SPIKE robust deviations (1.4826 times the median distance from the median, and at
    least a milli-nat). The first BEFORE steps never are."""
    found = np.zeros(len(losses), bool)
    if len(losses) > BEFORE:
        windows = np.lib.stride_tricks.sliding_window_view(losses[:-1], BEFORE)
        rises = losses[BEFORE:] - np.median(windows, axis=1)
        usual = np.median(rises)  # below 0 while the loss falls
        deviation = max(1.4826 * np.median(np.abs(rises - usual)), 1e-3)
        found[BEFORE:] = rises - usual > SPIKE * deviation
    return found


def differing(runs: Sequence[Recorded]) -> dict[str, list[str]]:
    """Settings beside rule, loops and folder that are not the same in all runs, with their values.

    What they differ in is part of any difference between their curves.
    """
    meant = {"model.variant", "model.loops", "train.run_dir", "train.eval_loops"}
    flat = [{key: repr(value) for key, value in r.config.leaves().items()} for r in runs]
    values = {key: list(dict.fromkeys(settings[key] for settings in flat)) for key in flat[0]}
    return {key: found for key, found in values.items() if len(found) > 1 and key not in meant}


# ---- the page ------------------------------------------------------------------------------------


def compare(runs: Sequence[Recorded], out: Path) -> Path:
    """Write the page; its path."""
    summaries = {run.name: summarise(run) for run in runs}
    files.write_text(
        out / "comparison.json",
        json.dumps({name: dataclasses.asdict(s) for name, s in summaries.items()}, indent=1),
    )
    best = min(summaries.items(), key=lambda item: item[1].loss)
    least = min(summaries.values(), key=lambda s: s.gradient_swings).gradient_swings
    lines = [f"Lowest training loss at the end: {best[0]}, {best[1].loss:.4f} nats."]
    lines += [
        f"{name}: its gradient norm swings {s.gradient_swings / least:.1f} times as much as that "
        "of the calmest run."
        for name, s in summaries.items()
        if s.gradient_swings > 3 * least > 0
    ]
    lines += [
        f"Not only rule and loops differ: {key} is {', '.join(values)}."
        for key, values in differing(runs).items()
    ]
    sections = [
        Section(
            "In numbers",
            f"Loss and growth are means of the last {LAST} steps. Growth: norm of the stream after "
            "the last loop over that after the first. Swings: standard deviation over mean of the "
            "gradient norm over steps, of all weights together and of what arrives in each loop "
            "(recorded with train.inside_every). Spikes: steps whose loss stands "
            f"{SPIKE:g} robust deviations above the median of the {BEFORE} before.",
            table=_table(summaries),
        ),
        Section(
            "Training loss",
            "Running mean of 10 steps. The colour is the rule, darker is more loops.",
            _over_steps(runs, {"loss, nats": lambda r: figures.running_mean(r.loss)}),
            "loss",
        ),
        Section(
            "Gradient and growth of the stream",
            "Gradient norm before clipping, and the norm of the stream after the last loop over "
            "that after the first. Swings of the first announce a plateau; growth alone does not.",
            _over_steps(
                runs, {"gradient norm": lambda r: r.gradient, "growth over the loops": _growth},
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
    if any(len(run.inside) > 1 for run in runs):
        sections.append(
            Section(
                "Gradient in each loop",
                "Norm of the gradient arriving in each loop, over steps; one line per loop, dark "
                "first. Lines that cross and jump mean that loops fight over the shared weights.",
                _inside([run for run in runs if len(run.inside) > 1]),
                "inside",
            )
        )
    about = f"{len(runs)} runs, from their metrics.jsonl."
    return html_report.write(out, "Runs side by side", about, lines, sections)


def _table(summaries: Mapping[str, Summary]) -> str:
    counts = sorted({k for s in summaries.values() for k in s.scores})
    heads = ["run", "steps", "loss", "growth", "gradient swings", "swings per loop", "spikes"]
    heads += [f"bits per byte at {k}" for k in counts]
    rows = []
    for name, s in summaries.items():
        loops = "not recorded" if s.loop_swings is None else f"{s.loop_swings:.2f}"
        cells = [name, str(s.steps), f"{s.loss:.4f}", f"{s.growth:.2f}",
                 f"{s.gradient_swings:.2f}", loops, str(s.spikes)]  # fmt: skip
        cells += [f"{s.scores[k]:.4f}" if k in s.scores else "–" for k in counts]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _colors(runs: Sequence[Recorded]) -> dict[str, Any]:
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


def _over_steps(runs: Sequence[Recorded], values: Mapping[str, Any], *, log: bool = False):
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


def _scores(runs: Sequence[Recorded]) -> Figure:
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


def _inside(runs: Sequence[Recorded]) -> Figure:
    columns = min(3, len(runs))
    figure, axes = figures.panels(columns, -(-len(runs) // columns), width=4, height=2.8)
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    for axis, run in zip(axes.flat, runs, strict=False):
        steps = np.linspace(run.steps[0], run.steps[-1], len(run.inside))
        for k, color in enumerate(figures.shades(run.inside.shape[1])):
            axis.semilogy(steps, run.inside[:, k], color=color, linewidth=1)
        figures.tidy(axis, title=run.name, xlabel="step")
    return figure


def _growth(run: Recorded) -> np.ndarray:
    return run.growth
