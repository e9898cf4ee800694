"""Whether a run trained, by its losses and gradient norms: two signs, and their thresholds.

plateau     its last losses are PLATEAU_GAP nats above those of one loop with the same seed, and in
            the second half it gained less than PLATEAU_GAIN of what one loop gained
gradient    the coefficient of variation (CV) of its gradient norm exceeds MAX_CV, or the gradient
            norm's peak exceeds MAX_PEAK times that of one loop

Both signs, or a value that is not finite: collapsed; one: unstable; none: trains. Without a run of
one loop to compare with, only values that are not finite and the CV count. The norm of the residual
stream decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# In the PyTorch reference, at the laptop preset of benchmarks/claim.py, runs that train have a
# gradient-norm CV of 0.14 to 0.35 and a peak below three times that of one loop; LT at the same
# learning rate has a CV of 0.54 to 3.9 and a peak of 6 to 65 times. The thresholds lie between.
PLATEAU_GAP, PLATEAU_GAIN = 0.5, 0.5
MAX_CV, MAX_PEAK = 0.5, 5.0
BURN_IN = 10  # first steps, left out of the gradient-norm CV
TAIL = 10  # losses that are averaged

Series = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Verdict:
    """The outcome of a run, and the numbers behind it.

    outcome: "trains", "unstable" or "collapsed"
    loss_at_half, loss_at_end: mean of the last TAIL losses of each half, nats
    grad_norm_cv, grad_norm_peak: coefficient of variation and maximum before clipping
    compared: whether there was a run of one loop to judge it by
    """

    outcome: str
    loss_at_half: float
    loss_at_end: float
    grad_norm_cv: float
    grad_norm_peak: float
    compared: bool


def judge(
    loss: Series, grad_norm: Series, one_loop: tuple[Series, Series] | None = None
) -> Verdict:
    """The verdict on a run of S steps: loss [S] in nats, grad_norm [S] before clipping.

    `one_loop` has both of the run of one loop with the same seed and as many steps.
    """
    half, end = levels(loss)
    norms = np.asarray(grad_norm, float)
    cv, peak = variation(norms[burn_in(len(norms)) :]), float(norms.max())
    plateau, varies = False, cv > MAX_CV
    if one_loop is not None:
        (single_half, single_end), single_norms = levels(one_loop[0]), one_loop[1]
        gained, expected = half - end, single_half - single_end
        plateau = end - single_end > PLATEAU_GAP and gained < PLATEAU_GAIN * expected
        varies = varies or peak > MAX_PEAK * max(single_norms)
    if not (np.isfinite(loss).all() and np.isfinite(norms).all()):
        plateau = varies = True
    outcome = ("trains", "unstable", "collapsed")[int(plateau) + int(varies)]
    return Verdict(outcome, half, end, cv, peak, one_loop is not None)


def levels(loss: Series) -> tuple[float, float]:
    """Mean of the TAIL last losses of the first half, and of all; of fewer in a short run."""
    half = max(len(loss) // 2, 1)
    return float(np.mean(loss[max(half - TAIL, 0) : half])), float(np.mean(loss[-TAIL:]))


def burn_in(steps: int) -> int:
    """Steps at the beginning that are not judged: BURN_IN, but at most half of all."""
    return min(BURN_IN, steps // 2)


def variation(values: np.ndarray) -> float:
    """Coefficient of variation (std / mean) over the first axis, mean over the others."""
    return float((values.std(axis=0) / values.mean(axis=0)).mean())
