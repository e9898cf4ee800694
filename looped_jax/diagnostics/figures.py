"""The figures of a diagnosis, each a matplotlib Figure without a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from looped_jax.diagnostics.measure import TokenMeasurements
from looped_jax.diagnostics.weight_statistics import MatrixStatistics
from looped_jax.plotting.figures import BLUE, RED, draw_heatmap, panels, shades, tidy

YLABELS = {
    "bpb": "bits per byte",
    "ppl": "perplexity per token",
    "error_trained": "wrong answers, as a share",
}


def by_loop(
    series: Mapping[str, np.ndarray], *, first: int, trained: int, labels: Sequence[str]
) -> Figure:
    """A panel per series over loops `first`, `first` + 1, …; the trained count is marked."""
    figure, axes = panels(len(series))
    for axis, (title, values), label in zip(axes[0], series.items(), labels, strict=True):
        loops = np.arange(first, first + len(values))
        axis.plot(loops, values, marker="o", markersize=4, color=BLUE)
        if first <= trained < first + len(values):
            axis.plot(trained, values[trained - first], "o", markersize=10, mfc="none", color=RED,
                      label="_trained")  # fmt: skip
        axis.xaxis.get_major_locator().set_params(integer=True)
        tidy(axis, title=title, xlabel="loop", ylabel=label)
    return figure


def loss_by_position(tokens: TokenMeasurements) -> Figure:
    """Mean loss over positions, one line per loop, positions in up to 32 bins."""
    figure, axes = panels(1, width=8, height=3.6)
    by_position = tokens.by_position(tokens.nats)
    places = np.flatnonzero(tokens.counted.any(axis=0))
    bins = np.array_split(places, min(32, len(places)))
    centres = [chunk.mean() for chunk in bins]
    for k, color in enumerate(shades(tokens.loops)):
        values = [by_position[k, chunk].mean() for chunk in bins]
        axes[0][0].plot(centres, values, color=color, label=f"{k + 1}", linewidth=1.3)
    axes[0][0].legend(title="loops", fontsize=7, ncols=-(-tokens.loops // 8))
    tidy(axes[0][0], xlabel="position in the row", ylabel="loss, nats")
    return figure


def settling(tokens: TokenMeasurements) -> Figure:
    """When predictions stop changing, and the accuracy of those that stop in each loop."""
    figure, axes = panels(2)
    counted = tokens.counted
    settled, loops = tokens.settled()[counted], np.arange(1, tokens.loops + 1)
    shares = np.array([(settled == k).mean() for k in loops])
    axes[0][0].bar(loops, 100 * shares, color=BLUE)
    tidy(axes[0][0], title="predictions that change last in a loop", xlabel="loop",
         ylabel="% of tokens")  # fmt: skip
    last, first = (tokens.correct()[k][counted] for k in (-1, 0))
    for values, label, color in ((first, "after loop 1", "#8ecae6"), (last, "at the end", BLUE)):
        accuracy = [values[settled == k].mean() if (settled == k).any() else np.nan for k in loops]
        axes[0][1].plot(
            loops, 100 * np.array(accuracy), "o-", color=color, label=label, markersize=4
        )
    axes[0][1].legend(fontsize=8)
    tidy(axes[0][1], title="accuracy of these predictions", xlabel="loop of the last change",
         ylabel="% of tokens")  # fmt: skip
    for axis in axes[0]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def attention(weights: np.ndarray, words: Sequence[str]) -> Figure:
    """Attention of one row [K, L, H, T, T]: loops down, layers and heads across."""
    loops, layers, heads, time, _ = weights.shape
    down = np.unique(np.linspace(0, loops - 1, min(loops, 6)).round().astype(int))
    positions = [(layer, head) for layer in range(layers) for head in range(heads)]
    across = np.unique(
        np.linspace(0, len(positions) - 1, min(len(positions), 6)).round().astype(int)
    )
    figure, axes = panels(len(across), len(down), width=2.6, height=2.6)
    for row, loop in enumerate(down):
        for column, position in enumerate(across):
            layer, head = positions[position]
            axis = axes[row][column]
            axis.set_label(f"loop {loop + 1}, layer {layer + 1}, head {head + 1}")
            axis.imshow(weights[loop, layer, head], cmap="magma", vmin=0)
            if row == 0:
                axis.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
            if column == 0:
                axis.set_ylabel(f"loop {loop + 1}", fontsize=9)
            show = time <= 24
            labels = [repr(word)[1:-1] for word in words] if show else []
            axis.set_yticks(range(time) if show and column == 0 else [])
            axis.set_xticks(range(time) if show and row == len(down) - 1 else [])
            if show and column == 0:
                axis.set_yticklabels(labels, fontsize=5)
            if show and row == len(down) - 1:
                axis.set_xticklabels(labels, fontsize=5, rotation=90)
    return figure


def attention_heatmap(weights: np.ndarray, words: Sequence[str], *, title: str) -> Figure:
    """Attention [T, T] of one loop, layer and head, from 0 to 1; both axes name the tokens."""
    side = max(3.6, 0.15 * len(words) + 1.6)
    figure = Figure(figsize=(side + 0.8, side), dpi=110, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(weights, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, shrink=0.8)
    axis.set(title=title, xlabel="key", ylabel="query")
    # A space would not be seen, and a dollar would begin a formula.
    labels = [repr(word)[1:-1].replace(" ", "␣").replace("$", r"\$") for word in words]
    axis.set_xticks(range(len(words)), labels, fontsize=7, rotation=90)
    axis.set_yticks(range(len(words)), labels, fontsize=7)
    return figure


def weight_histogram(name: str, found: MatrixStatistics) -> Figure:
    """Histogram of a weight's entries, with its largest singular value."""
    figure, axes = panels(1)
    axes[0][0].stairs(found.counts, found.edges, fill=True, color=BLUE)
    tidy(axes[0][0], xlabel="entry", ylabel="count")
    axes[0][0].set_title(f"{name}\nlargest singular value {found.spectral_norm:.4g}", fontsize=9)
    return figure


def histograms(matrices: Mapping[str, MatrixStatistics]) -> Figure:
    """A panel per kind of weight, a line per layer; counts on a log scale."""
    kinds: dict[str, list[str]] = {}
    for name in matrices:
        kind = name if "blocks" not in name else name.split(".", 2)[2]
        kinds.setdefault(kind, []).append(name)
    columns = min(4, len(kinds))
    figure, axes = panels(columns, -(-len(kinds) // columns), width=3.3, height=2.4)
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for axis, (kind, names) in zip(axes.flat, kinds.items(), strict=False):
        for name, color in zip(names, shades(len(names)), strict=True):
            found = matrices[name]
            middle = (found.edges[1:] + found.edges[:-1]) / 2
            axis.semilogy(middle, np.maximum(found.counts, 0.5), color=color, linewidth=1)
        axis.set_title(kind, fontsize=9)
        tidy(axis)
    return figure


def spectra(matrices: Mapping[str, MatrixStatistics]) -> Figure:
    """Spectral norm and effective rank of every weight."""
    figure, axes = panels(2, width=6.4, height=0.24 * len(matrices) + 1.2)
    names, positions = list(matrices), np.arange(len(matrices))
    for axis, title, values in (
        (axes[0][0], "spectral norm", [m.spectral_norm for m in matrices.values()]),
        (axes[0][1], "effective rank", [m.effective_rank for m in matrices.values()]),
    ):
        axis.barh(positions, values, color=BLUE, label=[f"_{name}" for name in names])
        axis.set_yticks(positions, names if axis is axes[0][0] else [], fontsize=7)
        axis.invert_yaxis()
        axis.margins(y=0.01)
        tidy(axis, title=title)
    axes[0][0].set_xscale("log")  # an embedding's is hundreds of times a block's
    return figure


def inside(entry: Mapping[str, Any], names: Sequence[str]) -> Figure:
    """Heatmaps side by side of what one logged step recorded per loop and layer."""
    loops, layers = np.shape(entry[f"diagnostics/{names[0]}"])
    figure, axes = panels(2, -(-len(names) // 2), width=max(4.2, 0.6 * layers + 2),
                          height=max(2.4, 0.32 * loops + 1.3))  # fmt: skip
    for axis, name in zip(axes.flat, names, strict=False):
        draw_heatmap(axis, entry[f"diagnostics/{name}"], title=name.replace("_", " "))
    return figure


def curves(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, validation, gradient norm and residual stream norm per loop of a run's log."""
    scored = _validations(entries)
    figure, axes = panels(max(2, 1 + len(scored)), 2, width=4.6, height=2.7)
    for axis in (*axes[0][1 + len(scored) :], *axes[1][2:]):
        axis.set_visible(False)
    steps = [e for e in entries if "train/loss" in e]
    x = [e["step"] for e in steps]
    axes[0][0].plot(x, [e["train/loss"] for e in steps], color=BLUE, alpha=0.3, linewidth=0.8)
    axes[0][0].plot(x, [e["train/loss_smooth"] for e in steps], color=BLUE)
    tidy(axes[0][0], title="training loss (thin) and its running mean", ylabel="nats")
    for axis, (metric, lines) in zip(axes[0][1:], scored.items(), strict=False):
        for (loops, values), color in zip(lines.items(), shades(len(lines)), strict=True):
            axis.plot(*zip(*values, strict=True), "o-", markersize=3, color=color, label=loops)
        axis.legend(title="loops", fontsize=6)
        label = YLABELS.get(metric, metric)
        tidy(axis, title=f"validation, {label}", ylabel=label)
        if metric == "ppl":
            axis.set_yscale("log")  # an untrained model's is the size of its vocabulary
    axes[1][0].semilogy(x, [e["train/grad_norm"] for e in steps], color=BLUE, linewidth=0.8)
    tidy(axes[1][0], title="gradient norm, before clipping", xlabel="step")
    norms = np.array([e["loop/residual_norm"] for e in steps])
    for k, color in enumerate(shades(norms.shape[1])):
        axes[1][1].semilogy(x, norms[:, k], color=color, linewidth=1, label=f"{k + 1}")
    axes[1][1].legend(title="loop", fontsize=6, ncols=2)
    tidy(axes[1][1], title="norm of the residual stream after each loop", xlabel="step")
    return figure


def _validations(
    entries: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Metric -> loops -> (step, value), of what checkpoints are judged by and of perplexity."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in entries:
        for key, value in entry.items():
            if key.startswith("val/"):
                metric, _, loops = key.removeprefix("val/").rpartition("_loops_")
                found.setdefault(metric, {}).setdefault(loops, []).append((entry["step"], value))
    return {m: lines for i, (m, lines) in enumerate(found.items()) if i == 0 or m == "ppl"}
