"""Figures and table of benchmarks/hops.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import looped_jax
from benchmarks.claim_figures import COLORS
from looped_jax.experiments.comparison.curves import last_validation
from looped_jax.experiments.comparison.run_record import RunRecord, read
from looped_jax.experiments.comparison.spread import Spread
from looped_jax.experiments.experiment import Experiment
from looped_jax.experiments.grid import Run
from looped_jax.plotting import figures

Rows = Mapping[str, list[RunRecord]]  # by label: a run for each seed
SETTLING = 2_048  # answers whose last change is looked up
# What a grid's rows are ranked by, and the loop counts that its table shows.
RANKED: dict[str, tuple[str | None, tuple[int, ...]]] = {
    "chain_ends": ("accuracy at 32", (4, 8, 32)),
    "steps": ("accuracy at 63", (4, 5, 12, 63)),
    "hops": (None, ()),
}


def rows_of(experiment: Experiment) -> Rows:
    found: dict[str, list[RunRecord]] = {}
    for run in experiment.runs:
        found.setdefault(run.row.label, []).append(read(run.folder))
    return found


def color(label: str) -> str:
    """A rule's own colour; grey for what does not loop."""
    plain = {"one loop": "#8d99ae", "one loop, equal FLOPs": "#4a5568"}
    return COLORS.get(label.partition(" ")[0], plain.get(label, "#222222"))


def overview(chain_ends: Rows, steps: Rows, hops: Rows) -> Figure:
    """The three tasks, a panel each."""
    figure, axes = figures.panels(3, width=5.2, height=4)
    first, second, third = axes[0]
    by_loops(first, chain_ends, trained=4)
    figures.tidy(
        first,
        title="To the end of a chain, final answer only:\ntrained on 4 nodes, tested on 8",
        xlabel="loops given", ylabel="accuracy",
    )  # fmt: skip
    by_loops(second, steps, trained=4)
    figures.tidy(second, title="A target for every loop:\nloop k owes k hops", xlabel="loops given")
    by_distance(third, hops, None)
    figures.tidy(third, title="One answer after up to four hops", xlabel="hops asked for")
    third.legend(fontsize=8, loc="lower left")
    for axis in axes[0]:
        axis.set_ylim(-0.03, 1.03)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, first)
    return figure


def chain_details(chain_ends: Rows, settled: Mapping[str, Mapping[int, Spread]]) -> Figure:
    """Accuracy by distance, and the loop after which an answer no longer changes."""
    figure, axes = figures.panels(2, width=5.2, height=4)
    by_distance(axes[0][0], chain_ends, 32)
    figures.tidy(
        axes[0][0], title="After 32 loops, by distance", xlabel="distance to the end of the chain",
        ylabel="accuracy",
    )  # fmt: skip
    axes[0][0].axvspan(-0.3, 3.3, color="#dddddd", zorder=0)
    axes[0][0].text(1.5, 0.03, "trained on", ha="center", color="#666666")
    axis = axes[0][1]
    for label, of in settled.items():
        distances = sorted(of)
        means = [of[d].mean for d in distances]
        errors = [of[d].deviation or 0 for d in distances]
        axis.errorbar(distances, means, errors, marker="o", markersize=4, color=color(label),
                      label=label, capsize=2)  # fmt: skip
    axis.plot(distances, [max(d, 1) for d in distances], ":", color="#666666",
              label="one loop a pointer")  # fmt: skip
    figures.tidy(
        axis, title="The last loop that changes an answer",
        xlabel="distance to the end of the chain", ylabel="loop (of 32)",
    )  # fmt: skip
    axis.legend(fontsize=8)
    _legend(figure, axes[0][0])
    return figure


def _legend(figure: Figure, axis: Axes) -> None:
    """The rows of one panel, below all of them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=7,
                  frameon=False, fontsize=9)  # fmt: skip


def by_loops(axis: Axes, rows: Rows, *, trained: int) -> None:
    """Accuracy on the test rows against loops; of what does not loop, a level."""
    axis.axvline(trained, color="#bbbbbb", linewidth=1, label="_trained")
    for label, runs in rows.items():
        if runs[0].config.model.loops == 1:
            level = np.mean([last_validation(run, "accuracy")[1] for run in runs])
            axis.axhline(level, color=color(label), linestyle=":", label=label)
            continue
        of_runs = [last_validation(run, "accuracy") for run in runs]
        loops = sorted(of_runs[0])
        values = np.array([[of[k] for k in loops] for of in of_runs])
        dash = "--" if label.startswith("LT_ia") else "-"
        axis.plot(loops, values.mean(0), dash, color=color(label), label=label, linewidth=1.6)
        axis.fill_between(loops, values.min(0), values.max(0), color=color(label), alpha=0.15)


def by_distance(axis: Axes, rows: Rows, loops: int | None) -> None:
    """Accuracy by the distance asked for, after `loops` loops or the trained count; bars: seeds."""
    for label, runs in rows.items():
        trained = runs[0].config.model.loops
        count = trained if loops is None or trained == 1 else loops
        of_runs = [distances(run, count) for run in runs]
        known = sorted(of_runs[0])
        values = np.array([[of[d] for d in known] for of in of_runs])
        style = ":" if trained == 1 else "--" if label.startswith("LT_ia") else "-"
        axis.errorbar(known, values.mean(0), values.std(0, ddof=1), fmt=style, marker="o",
                      markersize=4, color=color(label), label=label, capsize=2)  # fmt: skip


def distances(run: RunRecord, loops: int) -> dict[int, float]:
    """Accuracy on the test rows after `loops` loops, by distance."""
    prefix = "accuracy_distance_"
    names = {name for scores in run.validations.values() for name in scores}
    return {
        int(name.removeprefix(prefix)): last_validation(run, name)[loops]
        for name in names
        if name.startswith(prefix)
    }


def settling(runs: Sequence[Run], loops: int = 32) -> dict[int, Spread]:
    """The last loop that changes an answer, mean of the test rows' answers, by distance."""
    found: dict[int, list[float]] = {}
    for run in runs:
        model = looped_jax.load(run.folder)
        rows = model.task.validation_rows(test=True, loops=(loops,), most=SETTLING)
        tokens = np.stack([row.inputs for row in rows])
        far = np.stack([row.difficulty for row in rows])
        each = model.logits(tokens, loops=tuple(range(1, loops + 1)))
        answers = np.stack([np.asarray(of_loop).argmax(-1) for of_loop in each])
        changed = answers[1:] != answers[:-1]  # [loops − 1, rows, T]
        last = np.where(changed.any(0), loops - np.argmax(changed[::-1], axis=0), 1)
        for d in np.unique(far[far >= 0]).tolist():
            found.setdefault(d, []).append(float(last[far == d].mean()))
    return {d: Spread(tuple(values)) for d, values in found.items()}


def table(chain_ends: Rows, steps: Rows, hops: Rows) -> str:
    """Markdown: the numbers behind the panels, mean ± sample standard deviation over seeds."""
    parts = [
        "Accuracy, mean ± sample standard deviation over three seeds.",
        _table(
            "chain ends",
            chain_ends,
            {
                "trained (≤ 4 nodes)": lambda r: at_trained(r, "accuracy_trained"),
                "far, 4 loops": lambda r: after(r, 4),
                "far, 8 loops": lambda r: after(r, 8),
                "far, best count": best,
                "far, 32 loops": lambda r: after(r, 32),
            },
        ),
        _table(
            "a target per loop",
            steps,
            {
                "loops 1–4 (trained), lowest": lambda r: lowest(r, range(1, 5)),
                "5": lambda r: after(r, 5),
                "8": lambda r: after(r, 8),
                "16": lambda r: after(r, 16),
                "63": lambda r: after(r, 63),
                "lowest of 5–63": lambda r: lowest(r, range(5, 64)),
            },
        ),
        _table(
            "one answer",
            hops,
            {
                "steps": lambda r: float(r.config.train.steps),
                "all": lambda r: at_trained(r, "accuracy"),
                **{
                    f"{h} hop{'s' * (h > 1)}": (
                        lambda r, h=h: distances(r, r.config.model.loops)[h]
                    )
                    for h in range(1, 5)
                },
            },
        ),
    ]
    return "\n\n".join(parts) + "\n"


def at_trained(run: RunRecord, metric: str) -> float:
    return last_validation(run, metric)[run.config.model.loops]


def after(run: RunRecord, loops: int) -> float:
    """Accuracy on the test rows; of what does not loop, as it was trained."""
    return last_validation(run, "accuracy")[1 if run.config.model.loops == 1 else loops]


def best(run: RunRecord) -> float:
    """Accuracy on the test rows at the loop count where it is highest."""
    if run.config.model.loops == 1:
        return after(run, 1)
    return max(last_validation(run, "accuracy").values())


def lowest(run: RunRecord, loops: Iterable[int]) -> float:
    return min(last_validation(run, "accuracy")[k] for k in loops)


def _table(name: str, rows: Rows, columns: Mapping) -> str:
    lines = [f"| {name} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for label, runs in rows.items():
        cells = [_told(Spread(tuple(of(run) for run in runs))) for of in columns.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(spread: Spread) -> str:
    if all(value > 1 and value == int(value) for value in spread.values):
        return f"{spread.mean:.0f}"
    return f"{spread.mean:.3f} ± {spread.deviation or 0:.3f}"
