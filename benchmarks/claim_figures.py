"""Table and figures of benchmarks/claim.py, with the numbers of the PyTorch reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.claim_grid import Setting
from looped_jax.experiments.comparison.verdict import Verdict
from looped_jax.plotting import figure_files, figures

# Results of the PyTorch reference at the laptop preset on another corpus, a row per seed: loss at
# 100 and 200 steps, peak and coefficient of variation of the gradient norm, norm of the residual
# stream after the last and the first loop where it was recorded.
REFERENCE: dict[tuple[str, int, float], list[tuple[float, ...]]] = {
    ("FLT", 1, 1.0): [(2.20, 1.76, 1.6, 0.14, 56, 56)],
    ("LT", 3, 1.0): [(2.29, 1.92, 9.9, 0.54, 103, 62)],
    ("LT", 6, 1.0): [(2.70, 2.60, 19.8, 0.95, 218, 183)],
    ("LT", 9, 1.0): [(3.04, 3.46, 16.8, 1.25, 547, 585)],
    ("LT", 12, 1.0): [
        (3.46, 3.51, 16, 1.3, 792, 726),
        (3.26, 3.56, 42, 2.0, 643, 1075),
        (3.37, 3.59, 104, 3.9, 950, 1300),
    ],
    ("FLT", 12, 1.0): [
        (2.22, 1.81, 1.4, 0.14, 59, 60),
        (2.17, 2.02, 1.2, 0.14),
        (2.35, 1.80, 2.9, 0.25),
    ],
    ("FLT_res", 12, 1.0): [(2.24, 1.91, 16, 0.83, 236, 25), (2.33, 2.12, 4.5, 0.33)],
    ("LT_i", 12, 1.0): [(2.21, 1.80, 1.4, 0.14, 59)],
    ("LT_ia", 12, 1.0): [(2.21, 1.81, 1.5, 0.14, 57)],
    ("LT", 12, 0.25): [(2.74, 2.53, 19.9, 0.50, 18)],
    ("FLT", 12, 4.0): [(2.37, 2.08, 2.7, 0.35, 5.6e3, 6.1e3)],
}
COLORS = {"FLT": "#1b7837", "FLT_res": "#80b1d3", "LT_ia": "#e08214", "LT_i": "#8073ac",
          "LT": "#c1121f"}  # fmt: skip
Judged = Sequence[tuple[dict[str, Any], Verdict]]


def grouped(judged: Judged) -> dict[tuple, list[tuple[dict[str, Any], Verdict]]]:
    """By rule, K, rate and steps, in the order of the runs."""
    groups = defaultdict(list)
    for line, verdict in judged:
        groups[line["rule"], line["loops"], line["rate"], line["steps"]].append((line, verdict))
    return groups


def table(judged: Judged, *, reference: bool) -> str:
    """Markdown: a row per rule and loop count with the values of all seeds."""
    head = (
        "| run | verdicts | loss at half | at the end | held out | peak gradient | CV "
        "| norm last/first |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for (rule, loops, rate, steps), runs in grouped(judged).items():
        verdicts = [verdict for _, verdict in runs]
        name = f"{rule if loops > 1 else 'any rule'} K={loops}"
        name += (f" ×{rate:g} rate" if rate != 1 else "") + f", {steps} steps"
        cells = [
            ", ".join(v.outcome for v in verdicts),
            " ".join(f"{v.loss_at_half:.2f}" for v in verdicts),
            " ".join(f"{v.loss_at_end:.2f}" for v in verdicts),
            " ".join(f"{line['held_out']:.2f}" for line, _ in runs),
            " ".join(f"{v.grad_norm_peak:.1f}" for v in verdicts),
            " ".join(f"{v.grad_norm_cv:.2f}" for v in verdicts),
            " ".join(f"{n[-1]:.0f}/{n[0]:.0f}" for n in (line["mean_norms"] for line, _ in runs)),
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
        theirs = REFERENCE.get((rule, loops, rate)) if reference else None
        if theirs and steps == 200:
            columns = [" ".join(f"{row[i]:g}" for row in theirs) for i in range(4)]
            norms = " ".join("/".join(f"{n:g}" for n in row[4:]) or "–" for row in theirs)
            half, end, peak, cv = columns
            lines.append(f"| *reference* | | {half} | {end} | – | {peak} | {cv} | {norms} |")
    return "\n".join(lines)


def draw(judged: Judged, setting: Setting, out: Path, torch: Judged = ()) -> list[str]:
    """Write the files of curves and summary; the names of the PNGs.

    torch: the same runs by claim_torch.py, on the same tokens
    """
    usual, torch = (
        [(line, v) for line, v in runs if line["rate"] == 1 and line["steps"] == setting.steps]
        for runs in (judged, torch)
    )
    drawn = {"curves": _curves(usual), "summary": _summary(usual, torch)}
    for name, figure in drawn.items():
        figure_files.save(figure, out / name)
    return [f"{name}.png" for name in drawn]


def _curves(judged: Judged) -> Figure:
    """Rows: rules. Columns: loss, gradient norm, last loop's norm over steps, norms over loops."""
    rules = list(dict.fromkeys(line["rule"] for line, _ in judged if line["loops"] > 1)) or ["FLT"]
    counts = sorted({line["loops"] for line, _ in judged})
    colors = dict(
        zip(counts, matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(counts))), strict=True)
    )
    figure = Figure(figsize=(16, 2.7 * len(rules) + 0.6), layout="constrained")
    axes = figure.subplots(len(rules), 4, squeeze=False, sharey="col")
    for row, rule in zip(axes, rules, strict=True):
        for line, _ in judged:
            if line["rule"] != rule and line["loops"] > 1:
                continue
            color, steps = colors[line["loops"]], np.arange(1, line["steps"] + 1)
            norms = np.array(line["norms"], float)
            style = {"color": color, "linewidth": 0.8, "alpha": 0.75}
            row[0].plot(steps, figures.running_mean(line["loss"]), **style)
            row[1].semilogy(steps, line["grad_norm"], **style)
            row[2].semilogy(np.linspace(1, line["steps"], len(norms)), norms[:, -1], **style)
            row[3].semilogy(range(1, line["loops"] + 1), norms[-1], "o-", markersize=3, **style)
        row[0].set_ylabel(rule, fontsize=12)
    titles = ("loss, mean of 10 steps", "gradient norm", "norm after the last loop",
              "norm after each loop, last step")  # fmt: skip
    for column, title in enumerate(titles):
        axes[0][column].set_title(title)
        axes[-1][column].set_xlabel("loop" if column == 3 else "step")
    for axis in axes.flat:
        figures.tidy(axis)
    handles = [matplotlib.lines.Line2D([], [], color=colors[k], label=f"K = {k}") for k in counts]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(counts), frameon=False)
    return figure


def _summary(judged: Judged, torch: Judged) -> Figure:
    """Loss at the end and gradient-norm CV against K; points: seeds, crosses: PyTorch."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    rules = list(dict.fromkeys(line["rule"] for line, _ in judged if line["loops"] > 1)) or ["FLT"]
    counts = sorted({line["loops"] for line, _ in judged})
    for axis, field, title in (
        (axes[0], "loss_at_end", "training loss at the end, nats"),
        (axes[1], "grad_norm_cv", "gradient-norm CV (std / mean)"),
    ):
        for offset, rule in enumerate(rules):
            shift = 0.12 * (offset - (len(rules) - 1) / 2)
            means = []
            for x, k in enumerate(counts):
                values, theirs = (
                    [
                        getattr(v, field)
                        for line, v in runs
                        if line["loops"] == k and (line["rule"] == rule or k == 1)
                    ]
                    for runs in (judged, torch)
                )
                means.append(np.mean(values) if values else np.nan)
                axis.plot([x + shift] * len(values), values, "o", markersize=4, alpha=0.6,
                          color=COLORS[rule])  # fmt: skip
                axis.plot([x + shift] * len(theirs), theirs, "x", markersize=7, color=COLORS[rule])
            axis.plot(np.arange(len(counts)) + shift, means, color=COLORS[rule], label=rule)
        axis.set_xticks(range(len(counts)), [str(k) for k in counts])
        figures.tidy(axis, title=title, xlabel="loops K")
    axes[1].set_yscale("log")
    crosses = "\ncrosses: PyTorch, same tokens" if torch else ""
    axes[0].legend(title=f"points: seeds{crosses}", fontsize=8)
    return figure
