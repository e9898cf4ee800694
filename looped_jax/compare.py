"""Compare runs: one page on their losses, norms and gradients, from their metrics.jsonl.

    looped-jax compare runs/check/* --out runs/check_comparison

Writes index.html, which needs no other file, PNGs and comparison.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from looped_jax import cli, errors
from looped_jax.diagnostics.run_comparison import compare, read
from looped_jax.errors import DataError
from looped_jax.files import check_writable


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("compare", argv))


def run(args: argparse.Namespace) -> None:
    with errors.printed():
        check_writable(args.out, "--out")
        runs = [read(folder.resolve()) for folder in args.runs]
        names = [run.name for run in runs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"two folders are named {', '.join(sorted(twice))}; rename one")
        if broken := [r.name for r in runs if not math.isfinite(r.loss.sum() + r.grad_norm.sum())]:
            raise DataError(f"{', '.join(broken)}: metrics.jsonl has values that are not finite")
        path = compare(runs, args.out)
    print(f"open {path}")


if __name__ == "__main__":
    main()
