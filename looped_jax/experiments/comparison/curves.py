"""The figures of a comparison. Seeds of a row share a colour, no two rows do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from looped_jax.experiments.comparison.groups import Group
from looped_jax.experiments.comparison.run_record import RunRecord
from looped_jax.plotting import figures

Of = Callable[[RunRecord], tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]]


def over_steps(groups: Sequence[Group], values: Mapping[str, Of], *, log: bool = False) -> Figure:
    """A panel per entry of `values`, each giving the steps and the values of a run."""
    figure, axes = figures.panels(len(values), width=11 / len(values), height=4)
    for axis, (label, of) in zip(axes[0], values.items(), strict=True):
        _lines(axis, groups, of)
        _stops(axis, groups, of)
        if log:
            axis.set_yscale("log")
        figures.tidy(axis, title=label, xlabel="step")
    axes[0][0].legend(fontsize=7)
    return figure


def over_loops(groups: Sequence[Group], metric: str) -> Figure:
    """A score of the last validation at every loop count; a circle marks the trained one."""

    def of(run: RunRecord) -> tuple[list[int], list[float]]:
        counts = sorted(last_validation(run, metric).items())
        return [k for k, _ in counts], [value for _, value in counts]

    figure, axes = figures.panels(1, width=8, height=4)
    axis = axes[0][0]
    _lines(axis, groups, of, marker="o", markersize=4)
    for group, color in zip(groups, figures.distinct(len(groups)), strict=True):
        trained = group.runs[0].config.model.loops
        known = [last_validation(run, metric) for run in group.runs]
        values = [of_loops[trained] for of_loops in known if trained in of_loops]
        if values:
            axis.plot(trained, np.mean(values), "o", markersize=10, mfc="none", color=color,
                      label=f"_{group.label}, trained")  # fmt: skip
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=7)
    figures.tidy(axis, xlabel="loops at validation", ylabel=metric)
    return figure


def loop_gradients(groups: Sequence[Group]) -> Figure:
    """A panel a row: the norm of the gradient arriving in each loop of its first seed."""
    columns = min(3, len(groups))
    figure, axes = figures.panels(columns, -(-len(groups) // columns), width=4, height=2.8)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, group in zip(axes.flat, groups, strict=False):
        run = group.runs[0]
        steps = np.linspace(run.steps[0], run.steps[-1], len(run.loop_grad_norms))
        for k, color in enumerate(figures.shades(run.loop_grad_norms.shape[1])):
            axis.semilogy(
                steps, run.loop_grad_norms[:, k], color=color, linewidth=1, label=f"_loop {k + 1}"
            )
        figures.tidy(axis, title=group.label, xlabel="step")
    return figure


def last_validation(run: RunRecord, metric: str) -> Mapping[int, float]:
    """Loop count -> value of the last validation after a step that has this metric."""
    known = [of[metric] for step, of in run.validations.items() if step and metric in of]
    return known[-1] if known else {}


def _stops(axis: Axes, groups: Sequence[Group], of: Of) -> None:
    """A cross where a run stopped, because a value was not finite."""
    for group, color in zip(groups, figures.distinct(len(groups)), strict=True):
        for run in group.runs:
            known = [(x, y) for x, y in zip(*of(run), strict=True) if np.isfinite(y)]
            if run.stopped is not None and known:
                axis.plot(*known[-1], "x", color=color, markersize=9, mew=2,
                          label=f"_{run.name}, stopped")  # fmt: skip


def _lines(axis: Axes, groups: Sequence[Group], of: Of, **style: Any) -> None:
    """A line per row: of one seed, or the mean where all seeds are, over thin ones of each."""
    for group, color in zip(groups, figures.distinct(len(groups)), strict=True):
        found = [(run, *of(run)) for run in group.runs]
        thick = {"color": color, "linewidth": 1.5, "label": group.label, **style}
        if len(found) == 1:
            axis.plot(*found[0][1:], **thick)
            continue
        for run, x, y in found:
            axis.plot(x, y, color=color, linewidth=0.7, alpha=0.45, label=f"_{run.name}")
        by_x = [dict(zip(x, y, strict=True)) for _, x, y in found]
        shared = sorted(set.intersection(*map(set, by_x)))
        axis.plot(shared, [np.mean([values[x] for values in by_x]) for x in shared], **thick)
