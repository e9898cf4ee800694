"""Figures of results, drawn without a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED = "#2a6f97", "#c1121f"


def panels(columns: int, rows: int = 1, *, width: float = 4.6, height: float = 3.1) -> tuple:
    """A figure and its axes [rows, columns]; inches a panel."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def tidy(axis: Axes, **labels: Any) -> None:
    """Title and labels, a faint grid, no frame."""
    axis.set(**labels)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def distinct(count: int) -> np.ndarray:
    """`count` colours that are told apart, for things without an order; no two are the same."""
    if count <= 20:
        return matplotlib.colormaps["tab10" if count <= 10 else "tab20"](np.arange(count))
    return matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))


def shades(count: int) -> np.ndarray:
    """`count` colours from dark to bright, for things that have an order."""
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.88, count))


def running_mean(values: Sequence[float] | np.ndarray, width: int = 10) -> np.ndarray:
    """Mean of each value and up to `width` - 1 before it."""
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def heatmap(values: Sequence[Sequence[float]], *, title: str) -> Figure:
    """Loops down, layers across, each cell with its number while there is room.

    Colours are on a log scale where all values are positive and span more than a decade.
    """
    loops, layers = np.shape(values)
    size = (max(3.5, 0.75 * layers + 2), max(2.4, 0.34 * loops + 1.4))
    figure = Figure(figsize=size, layout="constrained")
    draw_heatmap(figure.subplots(), values, title=title)
    return figure


def draw_heatmap(axis: Axes, values: Sequence[Sequence[float]], *, title: str) -> None:
    """A heatmap, as `heatmap` draws it, into one axis of a larger figure."""
    array = np.asarray(values, float)
    loops, layers = array.shape
    wide = array.min() > 0 and array.max() > 10 * array.min()
    image = axis.imshow(array, aspect="auto", cmap="viridis", norm="log" if wide else "linear")
    axis.figure.colorbar(image, ax=axis)
    if array.size <= 150:
        middle = np.sqrt(array.min() * array.max()) if wide else (array.min() + array.max()) / 2
        for (loop, layer), value in np.ndenumerate(array):
            color = "white" if value < middle else "black"
            axis.text(
                layer, loop, f"{value:.2g}", ha="center", va="center", fontsize=7, color=color
            )
    axis.set(title=title, xlabel="layer", ylabel="loop")
    axis.set_xticks(range(layers), [str(i + 1) for i in range(layers)], fontsize=8)
    step = -(-loops // 16)
    axis.set_yticks(range(0, loops, step), [str(i + 1) for i in range(0, loops, step)], fontsize=8)


def against_loops(
    scores: Mapping[str, Sequence[float | None]], loops: Sequence[int], *, trained: int
) -> Figure:
    """A small panel per metric: its value at each loop count; the trained count is marked.

    None is a loop count that this metric was not measured at; what is not finite is not drawn.
    """
    columns = min(4, len(scores))
    figure, axes = panels(columns, -(-len(scores) // columns), width=3.2, height=2.3)
    for axis in axes.flat[len(scores) :]:
        axis.set_visible(False)
    for axis, (name, values) in zip(axes.flat, scores.items(), strict=False):
        known = {
            k: value
            for k, value in zip(loops, values, strict=True)
            if value is not None and np.isfinite(value)
        }
        at = [list(loops).index(k) for k in known]
        axis.plot(at, list(known.values()), marker="o", markersize=4, color=BLUE)
        if trained in known:
            axis.plot(
                list(loops).index(trained), known[trained],
                marker="o", markersize=9, mfc="none", color=RED, label="_trained",
            )  # fmt: skip
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(loops)), [str(k) for k in loops], fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        lowest, highest = (of(known.values(), default=0.0) for of in (min, max))
        if highest - lowest < 0.02:  # a flat line should look flat
            axis.set_ylim(lowest - 0.05, highest + 0.05)
        tidy(axis)
    figure.supxlabel(f"loops (circle: trained at {trained})", fontsize=9)
    return figure


def against_steps(
    scores: Mapping[str, Mapping[int, Mapping[int, float]]], *, trained: int
) -> Figure:
    """A panel per metric, a line per loop count: step -> value; that of the trained count is red.

    scores: metric -> loop count -> step -> value
    """
    columns = min(4, len(scores))
    figure, axes = panels(columns, -(-len(scores) // columns), width=3.2, height=2.3)
    for axis in axes.flat[len(scores) :]:
        axis.set_visible(False)
    for axis, (name, lines) in zip(axes.flat, scores.items(), strict=False):
        for color, (k, line) in zip(shades(len(lines)), lines.items(), strict=True):
            axis.plot(
                [*line], [*line.values()], color=RED if k == trained else color,
                marker="o", markersize=3, label=f"{k} loop{'s' if k > 1 else ''}",
            )  # fmt: skip
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
        tidy(axis)
    axes.flat[0].legend(fontsize=7)
    figure.supxlabel(f"step (red: trained at {trained} loops)", fontsize=9)
    return figure


def accuracy(
    lines: Mapping[str, Sequence[float | None]],
    by_difficulty: Mapping[int, Sequence[float | None]],
    loops: Sequence[int],
    *,
    trained: int,
    difficulty: str,
) -> Figure:
    """Accuracy against loop counts: lines by name, and a heatmap by difficulty if there is one.

    None is a loop count that was not measured.
    """
    figure, axes = panels(2 if by_difficulty else 1, width=5, height=3.4)
    of_all = axes[0][0]
    for (name, values), color in zip(lines.items(), distinct(len(lines)), strict=True):
        known = [value if value is not None else np.nan for value in values]
        of_all.plot(loops, known, "o-", markersize=3, color=color, label=name)
    of_all.axvline(trained, color=RED, linewidth=1, linestyle=":", label="trained loops")
    of_all.legend(fontsize=8)
    tidy(of_all, title="accuracy", xlabel="loops", ylim=(-0.03, 1.03))
    if by_difficulty:
        found = sorted(by_difficulty)
        axis, array = axes[0][1], np.array([by_difficulty[d] for d in found], float)
        image = axis.imshow(array, aspect="auto", cmap="viridis", vmin=0, vmax=1, origin="lower")
        figure.colorbar(image, ax=axis)
        axis.set(title=f"by {difficulty}", xlabel="loops", ylabel=difficulty)
        axis.set_xticks(range(len(loops)), [str(k) for k in loops], fontsize=8)
        axis.set_yticks(range(len(found)), [str(d) for d in found], fontsize=8)
        if trained in loops:
            axis.axvline(
                list(loops).index(trained), color=RED, linewidth=1, linestyle=":",
                label="trained loops",
            )  # fmt: skip
    return figure


def validation_by_loops(
    lines: Mapping[int, Mapping[int, float]], *, metric: str, trained: int
) -> Figure:
    """A line per loop count, step -> value; that of the trained count is red."""
    figure, axes = panels(1, width=6, height=3.4)
    for color, (k, line) in zip(shades(len(lines)), lines.items(), strict=True):
        told = {"label": f"{k} loop{'s' if k > 1 else ''}", "marker": "o", "markersize": 3}
        if k == trained:
            told |= {"label": f"{told['label']}, as trained", "zorder": 3}
        axes[0, 0].plot([*line], [*line.values()], color=RED if k == trained else color, **told)
    tidy(axes[0, 0], xlabel="step", ylabel=f"validation {metric}")
    axes[0, 0].legend(fontsize=8)
    return figure


class Ramp(Protocol):
    """The data of learning_rate_ramps; see training/lr_range_test.py."""

    @property
    def multipliers(self) -> np.ndarray: ...
    @property
    def losses(self) -> np.ndarray: ...
    @property
    def smoothed(self) -> np.ndarray: ...
    @property
    def steepest(self) -> float: ...
    @property
    def elbow(self) -> float: ...
    @property
    def lowest(self) -> float: ...


def learning_rate_ramps(ramps: Mapping[int, Ramp]) -> Figure:
    """Loss against the learning rate multiplier, a line per loop count."""
    figure, axes = panels(1, width=7.5, height=4)
    axis, colors = axes[0][0], shades(len(ramps))
    top = max(max(found.smoothed[0] for found in ramps.values()) * 1.15, 0.0)
    for color, (k, found) in zip(colors, ramps.items(), strict=True):
        axis.plot(found.multipliers, found.losses, color=color, alpha=0.25, linewidth=0.8,
                  label=f"_{k} loops, not smoothed")  # fmt: skip
        points = {"steepest": found.steepest, "elbow": found.elbow, "lowest": found.lowest}
        words = ", ".join(f"{name} ×{multiplier:.2g}" for name, multiplier in points.items())
        axis.plot(found.multipliers, found.smoothed, color=color, label=f"{k} loops: {words}")
        for (name, multiplier), marker in zip(points.items(), "vos", strict=True):
            height = np.interp(multiplier, found.multipliers, found.smoothed)
            axis.plot(multiplier, height, marker, color=color, mec="black", mew=0.6, zorder=3,
                      label=f"_{k} loops, {name}")  # fmt: skip
    axis.set_xscale("log")
    axis.set_ylim(top=top)
    axis.legend(fontsize=8)
    tidy(
        axis,
        xlabel="multiplier of all learning rates",
        ylabel="training loss, nats",
        title="Learning rate ramp (triangle: steepest, circle: elbow, square: lowest)",
    )
    return figure
