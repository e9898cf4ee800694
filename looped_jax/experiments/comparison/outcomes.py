"""How each of several runs ended, in words: its verdict, and where it stopped if it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from looped_jax.experiments.comparison.groups import one_loop
from looped_jax.experiments.comparison.run_record import RunRecord
from looped_jax.experiments.comparison.verdict import Verdict, judge


@dataclass(frozen=True)
class Outcome:
    """verdict: on all of its steps; end: where it stopped before its horizon, in words, or ""."""

    verdict: Verdict
    end: str

    @property
    def collapsed(self) -> bool:
        return self.verdict.outcome == "collapsed"

    def __str__(self) -> str:
        return self.verdict.outcome + (f" ({self.end})" if self.end else "")


def of(runs: Sequence[RunRecord]) -> Mapping[str, Outcome]:
    """By name; each run is held against that of one loop and the same seeds, where it is here."""
    return {run.name: Outcome(_verdict(run, runs), _end(run)) for run in runs}


def together(outcomes: Sequence[Outcome]) -> str:
    """The outcomes of a row's seeds: one word where they agree, else how many of each."""
    counts = Counter(map(str, outcomes))
    if len(counts) == 1:
        return str(outcomes[0])
    return ", ".join(f"{count} {told}" for told, count in counts.items())


def _verdict(run: RunRecord, runs: Sequence[RunRecord]) -> Verdict:
    single, count = one_loop(run, runs), len(run.steps)
    if single is None or single.stopped or len(single.steps) < count:
        return judge(run.loss, run.grad_norm)
    return judge(run.loss, run.grad_norm, (single.loss[:count], single.grad_norm[:count]))


def _end(run: RunRecord) -> str:
    if run.stopped is not None:
        return f"stopped at step {run.stopped}: not finite"
    return "" if run.complete else f"{run.steps[-1]:,} of {run.config.train.steps:,} steps"
