"""What a checkpoint knows of its run beside the arrays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from looped_jax.training.fingerprint import Fingerprint

Scores = dict[str, dict[int, float]]  # metric -> loop count -> value


@dataclass(frozen=True)
class RunMeta:
    """The JSON part of a checkpoint.

    step: optimizer steps taken
    positions: where each share of the rows goes on, in the order of shares
    smoothed_loss: state of the loss's moving average
    scores: of the last validation; the first metric is what a checkpoint is judged by
    score: that metric at the trained loop count if this very step was validated; lower is better
    best: the lowest such score so far; best_step: of which step, None where an older run forgot
    seconds: spent on these steps, over all resumes; not on compiling, scoring and saving
    flops: of these steps, over all resumes; None of an older run
    config: the resolved config; fingerprint: see training/fingerprint.py
    parameters: of the model, by each count of model/parameter_counts.py; {} of an older run
    reference: of a converted checkpoint, what the reference knew of it
    """

    step: int
    positions: list[dict[str, Any]] = field(default_factory=list)
    smoothed_loss: dict[str, float] | None = None
    scores: Scores = field(default_factory=dict)
    score: float | None = None
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    flops: float | None = None
    config: dict[str, Any] = field(default_factory=dict)
    fingerprint: Fingerprint = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    reference: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunMeta:
        """From what `to_json` gave, or from the form that it had before 2026-11-24."""
        values = dict(values)
        if "identity" in values:
            values["fingerprint"] = values.pop("identity")
        if "best_bpb" in values:
            values["best"] = values.pop("best_bpb")
        if "bpb" in values:
            values["scores"] = {"bpb": values.pop("bpb")}
        known = {f.name for f in dataclasses.fields(cls)}
        meta = cls(**{name: value for name, value in values.items() if name in known})
        scores = {
            metric: {int(k): float(v) for k, v in of.items()} for metric, of in meta.scores.items()
        }
        return dataclasses.replace(meta, scores=scores)
