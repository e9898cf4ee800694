"""Rows of a table: runs that differ in their seeds alone, and what the rows differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from looped_jax.comparison.run_record import RunRecord
from looped_jax.errors import ArgumentError

# Settings that every label tells, and those that with one loop have no effect.
RULE = ("model.variant", "model.loops", "train.eval_loops")


@dataclass(frozen=True)
class Group:
    """Runs that are equal in every setting but seeds and folder."""

    label: str
    runs: tuple[RunRecord, ...]


def group(runs: Sequence[RunRecord], labels: Mapping[str, str] | None = None) -> list[Group]:
    """The rows of `runs`, in the order in which they first appear.

    A label names rule and loops, and those settings that differ between the rows. `labels` gives
    others, by the name of a run of the row. Raises ArgumentError for one label on two rows.
    """
    found: dict[tuple, list[RunRecord]] = {}
    for run in runs:
        found.setdefault(tuple(settings(run).items()), []).append(run)
    different = differing(runs)
    rows = [Group(_label(of_row, different, labels or {}), tuple(of_row)) for of_row in
            found.values()]  # fmt: skip
    told = [row.label for row in rows]
    if twice := {label for label in told if told.count(label) > 1}:
        raise ArgumentError(
            f"{', '.join(sorted(twice))}: a label of two rows; runs of one row differ in nothing "
            "but seeds, so give each row its own"
        )
    return rows


def settings(run: RunRecord) -> dict[str, str]:
    """What a run shares with the others of its row: all settings but seeds and folder, as text."""
    return {
        key: repr(value)
        for key, value in run.config.leaves().items()
        if not key.endswith("seed") and key != "train.run_dir"
    }


def differing(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Settings beside rule, loops, seeds and folder that differ between runs, with their values.

    They may cause any difference between the curves.
    """
    flat = [settings(run) for run in runs]
    values = {key: list(dict.fromkeys(each[key] for each in flat)) for key in flat[0]}
    return {key: told for key, told in values.items() if len(told) > 1 and key not in RULE}


def one_loop(run: RunRecord, runs: Sequence[RunRecord]) -> RunRecord | None:
    """The run of one loop with the seeds and settings of `run`, if it is among `runs`.

    With one loop all rules are the same.
    """

    def comparable(one: RunRecord) -> dict[str, Any]:
        left_out = (*RULE, "train.run_dir")
        return {
            key: value
            for key, value in one.config.leaves().items()
            if key not in left_out and not key.startswith("model.rules.")
        }

    singles = (one for one in runs if one.config.model.loops == 1)
    return next((one for one in singles if comparable(one) == comparable(run)), None)


def _label(
    runs: Sequence[RunRecord], different: Mapping[str, Any], labels: Mapping[str, str]
) -> str:
    for run in runs:
        if run.name in labels:
            return labels[run.name]
    first, values = runs[0].config.model, runs[0].config.leaves()
    told = (f"{key}={_short(values[key])}" for key in different)
    return " ".join([f"{first.variant} K={first.loops}", *told])


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
