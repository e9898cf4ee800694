"""The table of runs: a row a group of seeds, a column a metric; as text and in four markups."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from looped_jax.errors import ArgumentError
from looped_jax.experiments.comparison import budget, outcomes, spread
from looped_jax.experiments.comparison.groups import Group
from looped_jax.experiments.comparison.metrics import Kind, Metric, measure, stability
from looped_jax.experiments.comparison.spread import Spread

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

    def rank(self, metric: str | None = None, reference: str | None = None) -> Table:
        """The same with the standing of every row: against the best, or the row `reference`.

        `metric` is the title of a column, by default the first score of validation. Raises
        ArgumentError for a column or row that is not there.
        """
        titles = {one.title: one for one in self.metrics("score", "detail", "cost", "stability")}
        if metric is not None and metric not in titles:
            raise ArgumentError(f"metric {metric!r}: no run has it; choose {', '.join(titles)}")
        labels = [row.label for row in self.rows]
        if reference is not None and reference not in labels:
            raise ArgumentError(
                f"reference {reference!r}: no row is labelled so; choose {', '.join(labels)}"
            )
        scores = self.metrics("score")
        by = titles[metric] if metric else next((s for s in scores if s.name != "loss"), scores[0])
        first = reference or self._best(by)
        rows = (dataclasses.replace(row, standing=self._standing(row, by, first, reference))
                for row in self.rows)  # fmt: skip
        return Table(tuple(rows), by, reference)

    def _best(self, by: Metric) -> str | None:
        """Label of the row with the best mean, of those that can be ranked."""
        sign = -1 if by.higher_is_better else 1
        means = {
            row.label: sign * row.cells[by].mean
            for row in self.rows
            if by in row.cells and spread.rankable(row.cells[by])
        }
        return min(means, key=lambda label: means[label], default=None)

    def _standing(self, row: Row, by: Metric, first: str | None, reference: str | None) -> str:
        if by not in row.cells or len(self.rows) == 1:
            return ""
        if row.label == first:
            return "reference" if reference else "best"
        cells = {each.label: each.cells.get(by) for each in self.rows}
        other = cells[first or row.label]
        if other is None:
            return ""
        return spread.against(
            row.cells[by],
            other,
            higher_is_better=by.higher_is_better,
            text=lambda value: by.text(value, like=other.mean),
        )

    def metrics(self, *kinds: Kind) -> list[Metric]:
        """The columns of these kinds, kind by kind."""
        known = dict.fromkeys(metric for row in self.rows for metric in row.cells)
        return [metric for kind in kinds for metric in known if metric.kind == kind]

    def cells(self, *kinds: Kind) -> list[list[str]]:
        """The header and all rows as text; what they are ranked by is always there."""
        columns, standing = self.metrics(*kinds), any(row.standing for row in self.rows)
        columns += [self.ranked] if self.ranked and self.ranked not in columns else []
        against = (
            f"{self.ranked.title} against {self.reference or 'the best'}" if self.ranked else ""
        )
        what = "mean ± sample sd" if any(row.seeds > 1 for row in self.rows) else "run"
        head = [what, "seeds", "outcome", *(metric.title for metric in columns)]
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
        whole = ([cell.replace(" ± ", "\u00a0±\u00a0") for cell in line] for line in lines)
        parts += ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in whole]
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

    def csv(self, **also: Mapping[str, str]) -> str:
        """Every metric, mean and sample standard deviation apart, unrounded; empty: not known.

        `also` are further columns: the text of each row, by its label.
        """
        columns = self.metrics("score", "cost", "stability", "detail")
        spreads = any(row.seeds > 1 for row in self.rows)
        head = ["run", *also, "seeds", "outcome"] + ["standing"] * bool(self.ranked)
        for metric in columns:
            head += [metric.title] + [f"{metric.title} sd"] * spreads
        file = io.StringIO()
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(head)
        for row in self.rows:
            line = [row.label, *(texts[row.label] for texts in also.values())]
            line += [str(row.seeds), row.outcome] + [row.standing] * bool(self.ranked)
            for metric in columns:
                cell = row.cells.get(metric, Spread(()))
                line += [_plain(cell.mean if cell.values else None)]
                line += [_plain(cell.deviation)] * spreads
            lines.writerow(line)
        return file.getvalue()


def tabulate(
    groups: Sequence[Group], *, loops: Sequence[int] = (), equal: str | None = None
) -> Table:
    """The table of `groups`, not ranked yet.

    Scores are shown at each run's trained loop count, and at `loops`. Rows are read off as runs
    ended, or at equal tokens, flops or seconds, see budget.steps, whose DataError this raises.
    """
    runs = [run for group in groups for run in group.runs]
    steps, found = budget.steps(runs, equal), outcomes.of(runs)
    rows = []
    for group in groups:
        measured = [
            measure(run, steps[run.name], loops=loops) | stability(run) for run in group.runs
        ]
        known = dict.fromkeys(metric for of_run in measured for metric in of_run)
        cells = {m: Spread(tuple(of_run[m] for of_run in measured if m in of_run)) for m in known}
        ends = [found[run.name] for run in group.runs]
        collapsed = any(end.collapsed for end in ends)
        rows.append(Row(group.label, len(ends), outcomes.together(ends), collapsed, cells))
    return Table(tuple(rows))


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"


def _text(metric: Metric, cell: Spread | None, seeds: int) -> str:
    if cell is None:
        return "–"
    told = metric.text(cell.mean)
    if cell.deviation is not None and (cell.deviation or metric.kind != "cost"):
        told += f" ± {metric.text(cell.deviation, like=cell.mean)}"
    return told + (f" ({len(cell.finite)} of {seeds})" if 0 < len(cell.finite) < seeds else "")
