"""Compare runs: one table and one page on their losses, scores, cost and stability.

    looped-jax compare runs/check/* --out runs/check_comparison
    looped-jax compare runs/grid/* --loops 1,4,8 --equal flops --metric ppl --out runs/compared

Runs that differ in their seeds alone are one row, with mean and sample standard deviation. Writes
index.html, which needs no other file; table.csv and table.tex of the rows, runs.csv of the runs,
comparison.json; and every figure as PNG, SVG and PDF, its numbers as CSV.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from looped_jax import cli, errors
from looped_jax.experiments.comparison.page import write_page
from looped_jax.experiments.comparison.run_record import read
from looped_jax.files import check_writable


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("compare", argv))


def run(args: argparse.Namespace) -> None:
    with errors.printed():
        check_writable(args.out, "--out")
        runs = [read(folder.resolve()) for folder in args.runs]
        path, table = write_page(
            runs,
            args.out,
            loops=args.loops,
            equal=args.equal,
            metric=args.metric,
            reference=args.reference,
        )
    print(table.text(*(("score", "cost") if args.equal else ("score",))))
    print(f"open {path}")


if __name__ == "__main__":
    main()
