"""The folder of a comparison: one page, its figures, and the tables as CSV, LaTeX and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from looped_jax import files
from looped_jax.errors import DataError
from looped_jax.experiments.comparison import curves, groups, outcomes, spread, verdict
from looped_jax.experiments.comparison.groups import Group
from looped_jax.experiments.comparison.metrics import SPIKE, WINDOW, Metric, measure, stability
from looped_jax.experiments.comparison.run_record import RunRecord
from looped_jax.experiments.comparison.table import SPREAD, Table, tabulate
from looped_jax.plotting import figures, html_report
from looped_jax.plotting.html_report import Section

ROWS = "groups"  # where comparison.json has the rows, beside a key for each run
LOSS, CV = Metric("loss", "score"), Metric("gradient-norm CV", "stability")
FILE_KEYS = {  # statistics by their names in comparison.json, which are older than these
    "residual growth": "growth",
    "gradient-norm CV": "gradient_swings",
    "CV per loop": "loop_swings",
    "spikes": "spikes",
}


def write_page(
    runs: Sequence[RunRecord],
    out: Path,
    *,
    labels: Mapping[str, str] | None = None,
    loops: Sequence[int] = (),
    equal: str | None = None,
    metric: str | None = None,
    reference: str | None = None,
) -> tuple[Path, Table]:
    """Write everything into `out`; the page's path, and its table.

    `labels` are of rows by the name of one of their runs, see groups.group; the others are as
    table.tabulate takes them. Raises DataError for two runs of a name, and what these raise.
    """
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"two folders are named {', '.join(sorted(twice))}; rename one")
    if ROWS in names:
        raise DataError(f"a folder is named {ROWS}, as the rows in comparison.json; rename it")
    rows = groups.group(runs, labels)
    table = tabulate(rows, loops=loops, equal=equal).rank(metric, reference)
    each = tabulate([Group(run.name, (run,)) for run in runs], loops=loops, equal=equal)
    row_of = {run.name: row.label for row in rows for run in row.runs}
    seed_of = {run.name: str(run.config.train.seed) for run in runs}
    files.write_text(out / "table.csv", table.csv())
    files.write_text(out / "runs.csv", each.csv(row=row_of, seed=seed_of))
    files.write_text(out / "table.tex", table.latex())
    files.write_json(out / "comparison.json", _numbers(runs, rows, table), indent=1)
    about = f"{len(runs)} runs in {len(rows)} rows, from what their folders hold."
    sections = [*_tables(table, each, equal), *_figures(runs, rows)]
    summary = _summary(runs, table, equal)
    return html_report.write(out, "Runs side by side", about, summary, sections), table


def _numbers(runs: Sequence[RunRecord], rows: Sequence[Group], table: Table) -> dict[str, Any]:
    """comparison.json: statistics of each run by its name, and the rows."""
    found: dict[str, Any] = {}
    for run in runs:
        of_run = {m.name: value for m, value in stability(run).items()}
        found[run.name] = {
            "steps": int(run.steps[-1]),
            "loss": measure(run)[LOSS],
            **{key: of_run.get(name) for name, key in FILE_KEYS.items()},
            "scores": curves.last_validation(run, _judged(runs) or ""),
        }
    found[ROWS] = [
        {
            "label": group.label,
            "runs": [run.name for run in group.runs],
            "outcome": row.outcome,
            "standing": row.standing,
            "metrics": {
                metric.title: {"mean": cell.mean, "deviation": cell.deviation,
                               "values": cell.values}
                for metric, cell in row.cells.items()
            },
        }
        for group, row in zip(rows, table.rows, strict=True)
    ]  # fmt: skip
    return found


def _judged(runs: Sequence[RunRecord]) -> str | None:
    """The metric that checkpoints are judged by: the first that validation gives."""
    return next((m for run in runs for of in run.validations.values() for m in of), None)


def _summary(runs: Sequence[RunRecord], table: Table, equal: str | None) -> list[str]:
    """What the numbers say, in a few sentences."""
    lines, by = [], table.ranked
    assert by is not None
    means = {row.label: row.cells[by].mean for row in table.rows if by in row.cells}
    known = {label: mean for label, mean in means.items() if np.isfinite(mean)}
    if known:
        word, pick = ("Highest", max) if by.higher_is_better else ("Lowest", min)
        first = pick(known, key=lambda label: known[label])
        lines.append(f"{word} {by.title}: {first}, {by.text(known[first])}.")
    if close := [row.label for row in table.rows if row.standing.startswith("within noise")]:
        lines.append(f"Within noise of {table.reference or 'the best'}: {', '.join(close)}.")
    if any(row.seeds == 1 for row in table.rows):
        lines.append("Rows of one seed have no spread, and are not ranked.")
    lines += [f"{row.label}: {row.outcome}." for row in table.rows if row.collapsed]
    if equal:
        lines.append(f"Rows are read off at equal {equal}, see the columns of cost.")
    if equal == "seconds":
        lines.append("Seconds are from each run's own log: only runs that took turns on one "
                     "machine compare.")  # fmt: skip
    variations = {row.label: row.cells[CV].mean for row in table.rows if CV in row.cells}
    least = min(variations.values(), default=0.0)
    lines += [
        f"{label}: its gradient-norm CV is {value / least:.1f} times the smallest of these rows."
        for label, value in variations.items()
        if value > 3 * least > 0
    ]
    lines += [
        f"Not only rule and loops differ: {key} is {', '.join(values)}."
        for key, values in groups.differing(runs).items()
    ]
    alone = [name for name, end in outcomes.of(runs).items() if not end.verdict.compared]
    if alone:
        lines.append(
            "Outcomes without a run of one loop, equal seed and settings beside them count only "
            f"values that are not finite and the gradient-norm CV: {', '.join(alone)}."
        )
    return lines


def _tables(table: Table, each: Table, equal: str | None) -> list[Section]:
    ranking = f" {spread.RULE}" if any(row.standing for row in table.rows) else ""
    read = (
        f"Each run is read off where it has spent the largest number of {equal} that all have "
        "reached, at its last validation up to there."
        if equal
        else "Each run is read off at its end."
    )
    return [
        Section(
            "In numbers",
            f"A row is what differs in its seeds alone. {SPREAD} Scores are at the trained loop "
            f"count unless another is named; evaluated: by looped-jax evaluate. {read} Loss is the "
            f"mean of the last {verdict.TAIL} training steps, in nats. FLOPs count every loop; "
            f"tokens/s are of the median step.{ranking} Unrounded, with more columns: table.csv; "
            "for papers: table.tex.",
            table=table.html(),
        ),
        Section(
            "Run by run",
            "Outcome: a plateau is a loss at the end "
            f"{verdict.PLATEAU_GAP:g} nats above that of one loop with the same seed, with less "
            f"than {verdict.PLATEAU_GAIN:g} of its gain in the second half; a gradient norm varies "
            f"if its CV exceeds {verdict.MAX_CV:g} or its peak {verdict.MAX_PEAK:g} times that of "
            "one loop. Both, or a value that is not finite: collapsed; one: unstable; none: "
            "trains. CV: coefficient of variation (standard deviation over mean) over steps, of "
            "the gradient norm of all weights together and of the gradient arriving in each loop "
            "(recorded with train.diagnostics_every). Residual growth: norm of the residual stream "
            "after the last loop over that after the first. Spikes: steps whose loss is "
            f"{SPIKE:g} robust deviations above the median of the {WINDOW} before. All of these "
            "are of whole runs. Unrounded: runs.csv.",
            table=each.html("score", "stability"),
        ),
    ]


def _figures(runs: Sequence[RunRecord], rows: Sequence[Group]) -> list[Section]:
    colours = "One colour a row; thin: its seeds, thick: their mean; a cross: it stopped there."
    judged = _judged(runs)
    sections = [
        Section(
            "Training loss",
            f"Running mean of 10 steps. {colours}",
            curves.over_steps(
                rows, {"loss, nats": lambda r: (r.steps, figures.running_mean(r.loss))}
            ),
            "loss",
        )
    ]
    if judged and any(sum(step > 0 for step in run.validations) > 1 for run in runs):
        sections.append(
            Section(
                f"Validation: {judged}",
                f"At the trained loop count. {colours}",
                curves.over_steps(rows, {judged: lambda r: _validation(r, judged)}),
                "validation",
            )
        )
    sections.append(
        Section(
            "Gradient norm and residual growth",
            "Gradient norm before clipping, and the norm of the residual stream after the last "
            "loop over that after the first. A gradient norm that varies strongly often precedes a "
            "plateau of the loss; residual growth alone does not.",
            curves.over_steps(
                rows,
                {
                    "gradient norm": lambda r: (r.steps, r.grad_norm),
                    "residual growth": lambda r: (r.steps, r.residual_growth),
                },
                log=True,
            ),
            "gradient",
        )
    )
    if judged:
        sections.append(
            Section(
                f"{judged} at every loop count",
                "The last validation of each run, all counts from one pass; circle: the trained "
                "count.",
                curves.over_loops(rows, judged),
                "scores",
            )
        )
    if recorded := [row for row in rows if len(row.runs[0].loop_grad_norms) > 1]:
        sections.append(
            Section(
                "Gradient in each loop",
                "Norm of the gradient arriving in each loop, over steps, of the first seed of each "
                "row; one line per loop, dark first. Lines that cross and jump: "
                "the loops' shares of the gradient change from step to step.",
                curves.loop_gradients(recorded),
                "inside",
            )
        )
    return sections


def _validation(run: RunRecord, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric at the trained loop count."""
    loops = run.config.model.loops
    known = {
        s: of[metric][loops] for s, of in run.validations.items() if loops in of.get(metric, {})
    }
    return list(known), list(known.values())
