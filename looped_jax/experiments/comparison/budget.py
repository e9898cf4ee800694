"""At which step each run is read off, so that all have spent as much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from looped_jax.errors import DataError
from looped_jax.experiments.comparison.run_record import RunRecord


def steps(runs: Sequence[RunRecord], equal: str | None = None) -> dict[str, int]:
    """The step at which each run is read off, by name: its last, or after `equal` expense.

    Then all runs are cut where they have spent the largest number of tokens, flops or seconds that
    all have reached (those that stopped early, because a value was not finite, do not count), and
    read off at the last validation up to there, or at the cut if none was before it. Raises
    DataError for a run that has no step up to there, or whose log does not tell.
    """
    if equal is None:
        return {run.name: int(run.steps[-1]) for run in runs}
    spent = {run.name: run.spent(equal) for run in runs}
    for name, so_far in spent.items():
        if not np.isfinite(so_far).all():
            raise DataError(f"{name}: its metrics.jsonl has no {equal}; compare at equal tokens")
    limit = min(spent[run.name][-1] for run in _counting(runs))
    found = {}
    for run in runs:
        within = run.steps[spent[run.name] <= limit]
        if not len(within):
            raise DataError(
                f"{run.name}: its first step takes more than the {limit:,.4g} {equal} that all "
                "runs have reached; leave out the shortest run"
            )
        cut = int(within[-1])
        found[run.name] = max((s for s in run.validations if 0 < s <= cut), default=cut)
    return found


def _counting(runs: Sequence[RunRecord]) -> list[RunRecord]:
    return [run for run in runs if run.stopped is None] or list(runs)
