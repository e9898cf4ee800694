"""The table of runs: a row a group of seeds, a column a metric; as text and in four markups."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from looped_jax.comparison import budget, outcomes, spread
from looped_jax.comparison.groups import Group
from looped_jax.comparison.metrics import Kind, Metric, measure, stability
from looped_jax.comparison.spread import Spread
from looped_jax.errors import ArgumentError

SPREAD = "Values are means over seeds ± their sample standard deviation; one seed shows none."
LATEX = str.maketrans({"\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
                       "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--",
                       **{c: rf"\{c}" for c in "&%$#_{}"}})  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A group in numbers. outcome, standing: in words; collapsed: whether any seed has."""

    label: str
    seeds: int
    outcome: str
    collapsed: bool
    cells: Mapping[Metric, Spread]
    standing: str = ""


@dataclass(frozen=True)
class Table:
    """Rows, and what they were ranked by. A metric that a row does not have is shown as "–"."""

    rows: tuple[Row, ...]
    ranked: Metric | None = None
    reference: str | None = None  # label of the row that the others stand against; None: the best

    def metrics(self, *kinds: Kind) -> list[Metric]:
        """The columns of these kinds, kind by kind."""
        known = dict.fromkeys(metric for row in self.rows for metric in row.cells)
        return [metric for kind in kinds for metric in known if metric.kind == kind]

    def cells(self, *kinds: Kind) -> list[list[str]]:
        """The header and all rows as text."""
        columns, standing = self.metrics(*kinds), any(row.standing for row in self.rows)
        against = (
            f"{self.ranked.title} against {self.reference or 'the best'}" if self.ranked else ""
        )
        head = ["run", "seeds", "outcome", *(metric.title for metric in columns)]
        lines = [head + [against] * standing]
        for row in self.rows:
            values = [_text(metric, row.cells.get(metric), row.seeds) for metric in columns]
            line = [row.label, str(row.seeds), row.outcome, *values]
            lines.append(line + [row.standing] * standing)
        return lines

    def text(self, *kinds: Kind) -> str:
        """For the console, columns one below the other."""
        lines = self.cells(*(kinds or ("score",)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(map(str.ljust, line, widths)) for line in lines)
        return "\n".join(line.rstrip() for line in padded)

    def markdown(self, *kinds: Kind) -> str:
        head, *rows = self.cells(*(kinds or ("score", "cost")))
        lines = [head, ["---"] * len(head), *rows]
        escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
        return "".join(f"| {' | '.join(line)} |\n" for line in escaped)

    def html(self, *kinds: Kind) -> str:
        """Rows with a collapsed seed are of the class "collapsed"."""
        head, *lines = self.cells(*(kinds or ("score", "cost")))
        parts = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
        parts += ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines]
        marks = ["", *(" class='collapsed'" * row.collapsed for row in self.rows)]
        rows = (f"<tr{mark}>{part}</tr>" for mark, part in zip(marks, parts, strict=True))
        return f"<table>{''.join(rows)}</table>"

    def latex(self, *kinds: Kind) -> str:
        r"""A tabular for \usepackage{booktabs}."""
        head, *rows = (
            " & ".join(cell.translate(LATEX) for cell in line) + r" \\"
            for line in self.cells(*(kinds or ("score",)))
        )
        columns = "lr" + "l" * (len(self.cells(*(kinds or ("score",)))[0]) - 2)
        return "\n".join(
            [f"% {SPREAD}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule",
             *rows, r"\bottomrule", r"\end{tabular}", ""]
        )  # fmt: skip

    def csv(self) -> str:
        """Every metric, mean and sample standard deviation apart, unrounded; empty: not known."""
        columns = self.metrics("score", "cost", "stability", "detail")
        head = ["run", "seeds", "outcome"]
        for metric in columns:
            head += [metric.title, f"{metric.title} sd"]
        lines = [head + (["standing"] if self.ranked else [])]
        for row in self.rows:
            line = [row.label, str(row.seeds), row.outcome]
            for metric in columns:
                cell = row.cells.get(metric)
                line += ["", ""] if cell is None else [_plain(cell.mean), _plain(cell.deviation)]
            lines.append(line + ([row.standing] if self.ranked else []))
        return write_csv(lines)


def tabulate(
    groups: Sequence[Group],
    *,
    loops: Sequence[int] = (),
    equal: str | None = None,
    metric: str | None = None,
    reference: str | None = None,
) -> Table:
    """The table of `groups`.

    loops: loop counts at which scores are shown, beside each run's trained one
    equal: read rows off at equal tokens, flops or seconds, see budget.py; by default as runs ended
    metric: title of the column that rows are ranked by; by default the first score of validation
    reference: label of a row that the others are held against; by default the best

    Raises ArgumentError for a metric or row that is not there, DataError as budget.steps does.
    """
    runs = [run for group in groups for run in group.runs]
    steps = budget.steps(runs, equal)
    found = outcomes.of(runs)
    measured = {
        run.name: measure(run, steps[run.name], loops=loops) | stability(run) for run in runs
    }
    rows = []
    for group in groups:
        of_runs = [measured[run.name] for run in group.runs]
        columns = dict.fromkeys(one for of_run in of_runs for one in of_run)
        cells = {one: Spread(tuple(of[one] for of in of_runs if one in of)) for one in columns}
        told = [found[run.name] for run in group.runs]
        rows.append(Row(group.label, len(told), outcomes.together(told),
                        any(one.collapsed for one in told), cells))  # fmt: skip
    return _ranked(Table(tuple(rows)), metric, reference)


def _ranked(table: Table, metric: str | None, reference: str | None) -> Table:
    """The table with the standing of every row."""
    titles = {one.title: one for one in table.metrics("score", "detail", "cost", "stability")}
    if metric is not None and metric not in titles:
        raise ArgumentError(f"metric {metric} is in none of the runs; choose {', '.join(titles)}")
    labels = [row.label for row in table.rows]
    if reference is not None and reference not in labels:
        raise ArgumentError(f"no row is labelled {reference}; choose {', '.join(labels)}")
    scores = table.metrics("score")
    by = titles[metric] if metric else next((s for s in scores if s.name != "loss"), scores[0])
    sign = -1 if by.higher_is_better else 1
    cells = {row.label: row.cells[by] for row in table.rows if by in row.cells}
    able = [label for label, cell in cells.items() if spread.rankable(cell)]
    first = reference or min(able, key=lambda label: sign * cells[label].mean, default=None)

    def standing(label: str) -> str:
        if label not in cells or len(labels) == 1:
            return ""
        if label == first:
            return "reference" if reference else "best"
        other = cells.get(first or label)
        return (
            spread.against(cells[label], other, higher_is_better=by.higher_is_better)
            if other
            else ""
        )

    rows = (dataclasses.replace(row, standing=standing(row.label)) for row in table.rows)
    return Table(tuple(rows), by, reference)


def write_csv(lines: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"


def _text(metric: Metric, cell: Spread | None, seeds: int) -> str:
    if cell is None:
        return "–"
    told = metric.text(cell.mean)
    if cell.deviation is not None and (cell.deviation or metric.kind != "cost"):
        told += f" ± {metric.text(cell.deviation, like=cell.mean)}"
    return told + (f" ({len(cell.finite)} of {seeds})" if 0 < len(cell.finite) < seeds else "")
