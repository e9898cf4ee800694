"""Seeds: their mean and spread, and whether the difference of two means is more than noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

RULE = (
    "Within noise: by Welch's t-test (two-sided, 5%, not corrected for the number of rows) the "
    "means of the seeds could be equal."
)


@dataclass(frozen=True)
class Spread:
    """A value of several seeds. What is not finite is counted, and left out of mean and deviation.

    mean: NaN where no value is finite; deviation: sample standard deviation, None of fewer than two
    """

    values: tuple[float, ...]

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]

    @property
    def mean(self) -> float:
        return float(np.mean(self.finite)) if self.finite else math.nan

    @property
    def deviation(self) -> float | None:
        return float(np.std(self.finite, ddof=1)) if len(self.finite) > 1 else None


def rankable(one: Spread) -> bool:
    """Whether it can be held against another: two values at least, and all of them finite."""
    return len(one.values) == len(one.finite) > 1


def against(
    one: Spread, other: Spread, *, higher_is_better: bool, text: Callable[[float], str] = str
) -> str:
    """How `one` stands against `other`, in words, by RULE. `text` prints a difference."""
    for spread in (one, other):
        if len(spread.finite) < len(spread.values):
            return "not finite, not ranked"
        if spread.deviation is None:
            return "one seed: no spread, no ranking"
    difference = one.mean - other.mean
    error, limit = welch(one, other)
    word = "better" if (difference > 0) == higher_is_better else "worse"
    if abs(difference) <= limit * error:
        word = "within noise"
    sign = "+" if difference > 0 else ""
    return f"{word} ({sign}{text(difference)}, standard error {text(error)})"


def welch(one: Spread, other: Spread) -> tuple[float, float]:
    """The standard error of the difference of the means, and how many of them may be chance.

    The latter is the 97.5% quantile of Student's t with Welch's degrees of freedom (Welch, "The
    generalization of 'Student's' problem", 1947); both spreads have a deviation.
    """
    shares = [np.var(s.finite, ddof=1) / len(s.finite) for s in (one, other)]
    error = math.sqrt(sum(shares))
    if not error:
        return 0.0, 0.0
    freedom = sum(shares) ** 2 / sum(
        share**2 / (len(s.finite) - 1) for share, s in zip(shares, (one, other), strict=True)
    )
    return error, float(special.stdtrit(freedom, 0.975))
