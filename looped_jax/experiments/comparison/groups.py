"""Rows of a table: runs that differ in their seeds alone, and what the rows differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from looped_jax.errors import ArgumentError
from looped_jax.experiments.comparison.run_record import RunRecord
from looped_jax.training import fingerprint

RULE = ("model.variant", "model.loops")  # every label tells them
SAME = ("train.run_dir", "train.eval_loops")  # they make no other run of it


@dataclass(frozen=True)
class Group:
    """Runs that are equal in every setting but seeds, folder, and the loop counts scored."""

    label: str
    runs: tuple[RunRecord, ...]


def group(runs: Sequence[RunRecord], labels: Mapping[str, str] | None = None) -> list[Group]:
    """The rows of `runs`, in the order in which they first appear.

    A label names rule and loops, and the settings that differ between the rows: those that change
    what is learnt, and if rows would be called the same, the others too. `labels` gives others, by
    the name of a run of the row. Raises ArgumentError for one of them on two rows.
    """
    found: dict[tuple, list[RunRecord]] = {}
    for run in runs:
        found.setdefault(tuple(settings(run).items()), []).append(run)
    for keys in (list(filter(_learnt, differing(runs))), list(differing(runs))):
        told = [_label(of_row, keys, labels or {}) for of_row in found.values()]
        if len(set(told)) == len(told):
            return [Group(label, tuple(of)) for label, of in zip(told, found.values(), strict=True)]
    twice = {label for label in told if told.count(label) > 1}
    raise ArgumentError(
        f"{', '.join(sorted(twice))}: the label of two rows, which differ in more than seeds; give "
        "each its own"
    )


def settings(run: RunRecord) -> dict[str, str]:
    """What a run shares with the others of its row, as text."""
    return {
        key: repr(value)
        for key, value in run.config.leaves().items()
        if not key.endswith("seed") and key not in SAME
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
        left_out = (*RULE, *SAME)
        return {
            key: value
            for key, value in one.config.leaves().items()
            if key not in left_out and not key.startswith("model.rules.")
        }

    singles = (one for one in runs if one.config.model.loops == 1)
    return next((one for one in singles if comparable(one) == comparable(run)), None)


def _learnt(key: str) -> bool:
    """Whether a setting changes what is learnt, and is not only about what is told of it."""
    group, _, name = key.partition(".")
    return group != "train" or name in fingerprint.TRAIN


def _label(runs: Sequence[RunRecord], keys: Sequence[str], labels: Mapping[str, str]) -> str:
    for run in runs:
        if run.name in labels:
            return labels[run.name]
    first, values = runs[0].config.model, runs[0].config.leaves()
    told = (f"{key}={_short(values[key])}" for key in keys)
    return " ".join([f"{first.variant} K={first.loops}", *told])


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
