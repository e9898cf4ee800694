"""Tables and figure of benchmarks/parts.py, from what its runs scored."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from scipy import stats

from benchmarks.parts_grids import (
    BASELINE,
    CLOSE,
    EQUAL_FLOPS,
    LEFT_OUT,
    NOT_MEASURED,
    PLACES,
    ROWS,
    SEEDS,
)
from looped_jax.experiments.comparison.curves import last_validation
from looped_jax.experiments.comparison.metrics import HIGHER
from looped_jax.experiments.comparison.run_record import read
from looped_jax.experiments.comparison.spread import Spread
from looped_jax.experiments.experiment import is_complete
from looped_jax.experiments.grid import Run
from looped_jax.model import flops
from looped_jax.plotting import figures

LEVEL = 0.05  # of all rows of a place together
COLORS = {
    "better": "#2a6f97", "worse": "#c1121f", "unclear": "#e9a23b", "within noise": "#8d99ae",
}  # fmt: skip


@dataclass(frozen=True)
class Numbers:
    """What the runs of a row scored, a value for each seed; NaN where training diverged.

    also: the place's second score; steps: of a run; step_flops: of a step, loops as expected
    """

    values: tuple[float, ...]
    also: tuple[float, ...]
    steps: int
    step_flops: float
    parameters: int


def numbers(place: str, runs: Sequence[Run]) -> dict[str, Numbers]:
    """By label, of the rows of a place whose runs are all among `runs`."""
    by_row: dict[str, list[Run]] = {}
    for run in runs:
        by_row.setdefault(run.row.label, []).append(run)
    at = PLACES[place]
    found = {}
    for label, of_row in by_row.items():
        if len(of_row) < len(SEEDS):
            continue
        config = of_row[0].config
        found[label] = Numbers(
            tuple(_score(run, at.metric, at.loops) for run in of_row),
            tuple(_score(run, *at.also) for run in of_row),
            config.train.steps,
            of_row[0].flops / config.train.steps,
            flops.count(config.model).parameters,
        )
    return found


def read_numbers(path: Path) -> dict[str, Numbers]:
    """What `as_text` wrote; none where there is no file."""
    values = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return {label: Numbers(**of) for label, of in values.items()}


def as_text(found: Mapping[str, Numbers]) -> str:
    """JSON, a line a row."""
    lines = (f"{json.dumps(k)}: {json.dumps(dataclasses.asdict(v))}" for k, v in found.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _score(run: Run, metric: str, loops: int | None) -> float:
    """After `loops` loops; of what does not loop, and by default, as it was trained."""
    if not is_complete(run):
        return math.nan
    trained = run.config.model.loops
    of_loops = last_validation(read(run.folder), metric)
    return float(of_loops[trained if loops is None or trained == 1 else loops])


# ---- what is noise -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Against:
    """A row beside the baseline.

    p: Welch's, of this row alone
    word: "better" or "worse" after Holm's correction; "unclear" where p is small but not after it;
    else "within noise"; "diverged" where a seed has no score
    """

    difference: float
    p: float
    word: str


def judge(place: str, found: Mapping[str, Numbers]) -> dict[str, Against]:
    """Every row against the baseline: Welch's t-test, two-sided, corrected for the rows by Holm.

    Rows whose seeds all score what the baseline's do have p = 1. Sources: Welch, "The
    generalization of 'Student's' problem", 1947; Holm, "A simple sequentially rejective multiple
    test procedure", 1979.
    """
    base, higher = found[BASELINE].values, PLACES[place].metric.startswith(HIGHER)
    rows = {label: of.values for label, of in found.items() if label != BASELINE}
    p_values = {label: _welch(values, base) for label, values in rows.items()}
    holds = holm(p_values)
    judged = {}
    for label, values in rows.items():
        difference = float(np.mean(values) - np.mean(base))
        word = "better" if (difference > 0) == higher else "worse"
        if not math.isfinite(difference):
            word = "diverged"
        elif not holds[label]:
            word = "unclear" if p_values[label] < LEVEL else "within noise"
        judged[label] = Against(difference, p_values[label], word)
    return judged


def holm(p_values: Mapping[str, float], level: float = LEVEL) -> dict[str, bool]:
    """Which of them hold together: the k-th smallest of n is below level / (n − k + 1), as all
    before it are."""
    holds, held = dict.fromkeys(p_values, False), True
    for passed, (label, p) in enumerate(sorted(p_values.items(), key=lambda one: one[1])):
        held = held and p <= level / (len(p_values) - passed)
        holds[label] = held
    return holds


def _welch(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p; 1 where nothing can be said, as of fewer than two values."""
    if sorted(one) == sorted(other) or min(len(one), len(other)) < 2:
        return 1.0
    told = [(np.mean(values), np.std(values, ddof=1), len(values)) for values in (one, other)]
    p = float(stats.ttest_ind_from_stats(*told[0], *told[1], equal_var=False).pvalue)
    return p if math.isfinite(p) else 1.0


# ---- as a page has it ----------------------------------------------------------------------------


def markdown(found: Mapping[str, Mapping[str, Numbers]], times: Mapping[str, Mapping]) -> str:
    """A table for each place, and what has no row."""
    parts = [
        _table(place, of, times.get(place, {})) for place, of in found.items() if BASELINE in of
    ]
    parts += [f"Not in the tables: `{name}` {why}." for name, why in LEFT_OUT.items()]
    if NOT_MEASURED:
        parts.append(f"Not measured yet: {', '.join(f'`{name}`' for name in NOT_MEASURED)}.")
    return "\n\n".join(parts) + "\n"


def _table(place: str, found: Mapping[str, Numbers], times: Mapping[str, float]) -> str:
    at, judged, base = PLACES[place], judge(place, found), found[BASELINE]
    second = f"{at.also[0].replace('_', ' ')}, " + (
        f"{at.also[1]} loops" if at.also[1] else "trained loops"
    )
    head = [
        at.title, "equal tokens", "against the baseline", "p", second, "FLOPs", "step time",
        "equal FLOPs", "against the baseline", "p",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for label in _labels(found):
        row, longer = found[label], label + EQUAL_FLOPS
        work = row.step_flops / base.step_flops
        line = [label, _mean(row.values), *_standing(judged.get(label))]
        line += [_mean(row.also), f"{work:.2f}"]
        line += [f"{times[label]:.2f}" if label in times else "–"]
        if longer in found:
            line += [_mean(found[longer].values), *_standing(judged[longer])]
        else:
            line += ["the same" if abs(work - 1) <= CLOSE and label != BASELINE else "", "", ""]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _labels(found: Mapping[str, Numbers]) -> list[str]:
    listed = [BASELINE, *(label for of_kind in ROWS.values() for label in of_kind)]
    return [label for label in listed if label in found]


def _mean(values: Sequence[float]) -> str:
    spread = Spread(tuple(values))
    if not spread.finite:
        return "diverged"
    told = f"{spread.mean:.3f}"
    told += "" if spread.deviation is None else f" ± {spread.deviation:.3f}"
    short = len(values) - len(spread.finite)
    return told + (f" ({short} of {len(values)} diverged)" if short else "")


def _standing(against: Against | None) -> list[str]:
    if against is None:
        return ["", ""]
    if against.word == "diverged":
        return ["diverged", "–"]
    word = f"**{against.word}**" if against.word in ("better", "worse") else against.word
    p = f"{against.p:.3f}" if against.p >= 0.001 else f"{against.p:.0e}"
    return [f"{against.difference:+.3f}, {word}", p]


def figure(found: Mapping[str, Mapping[str, Numbers]]) -> Figure:
    """A panel a place: every seed of every row less the baseline's mean."""
    known = {place: of for place, of in found.items() if BASELINE in of}
    labels = list(dict.fromkeys(label for of in known.values() for label in _labels(of)))
    drawn, axes = figures.panels(len(known), width=4.4, height=0.24 * len(labels) + 1.2)
    for axis, (place, of) in zip(axes[0], known.items(), strict=True):
        judged, base = judge(place, of), of[BASELINE].values
        axis.axvspan(*(np.array([min(base), max(base)]) - np.mean(base)), color="#dddddd", zorder=0)
        axis.axvline(0, color="#bbbbbb", linewidth=1, label="_baseline")
        for height, label in enumerate(labels):
            for name, style, shift in ((label, "o", 0), (label + EQUAL_FLOPS, "D", 0.28)):
                if name not in of:
                    continue
                color = COLORS.get(judged[name].word if name in judged else "", "#222222")
                seeds = np.array(of[name].values) - np.mean(base)
                axis.plot(seeds, [height + shift] * len(seeds), style, markersize=4 - 4 * shift,
                          color=color, label=f"_{name}", alpha=0.8)  # fmt: skip
        axis.set_yticks(range(len(labels)), labels if axis is axes[0][0] else [""] * len(labels))
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.set_xscale("symlog", linthresh=0.1)
        axis.xaxis.set_major_locator(FixedLocator([-1, -0.3, -0.1, -0.05, 0, 0.05, 0.1, 0.3, 1]))
        axis.xaxis.set_major_formatter("{x:g}")
        title = PLACES[place].title.replace(", ", ",\n")
        figures.tidy(axis, title=title, xlabel="less the baseline's mean")
        axis.tick_params(labelsize=8)
    handles = [
        *(axes[0][0].plot([], [], "o", color=c, label=f"{w}")[0] for w, c in COLORS.items()),
        axes[0][0].plot([], [], "D", color="#222222", markersize=3, label="equal FLOPs")[0],
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return drawn
