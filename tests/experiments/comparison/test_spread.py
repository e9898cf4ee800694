"""Spread and noise, against scipy's own t-test."""

import math

import numpy as np
import pytest
from scipy import stats

from looped_jax.experiments.comparison.spread import Spread, against

CHANCE = np.random.default_rng(0)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("seeds", [(3, 3), (2, 5)])
def test_noise_is_what_the_t_test_calls_not_significant(shift, seeds):
    one, other = CHANCE.normal(0, 1, seeds[0]), CHANCE.normal(shift, 0.3, seeds[1])
    p = stats.ttest_ind(one, other, equal_var=False).pvalue
    words = against(Spread(tuple(one)), Spread(tuple(other)), higher_is_better=False)
    assert words.startswith("within noise") == (p >= 0.05)
    if p < 0.05:
        assert words.startswith("better" if one.mean() < other.mean() else "worse")


def test_mean_and_sample_standard_deviation():
    found = Spread((1.0, 2.0, 4.0))
    assert (found.mean, found.deviation) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert Spread((3.0,)).deviation is None
    broken = Spread((1.0, math.nan, 2.0))
    assert broken.mean == 1.5 and broken.finite == [1.0, 2.0]


@pytest.mark.parametrize(
    ("one", "other", "higher", "words"),
    [
        ((1.0,), (2.0, 3.0), False, "one seed: no spread, no ranking"),
        ((1.0, 2.0), (2.0,), False, "one seed: no spread, no ranking"),
        ((1.0, math.nan), (2.0, 3.0), False, "not finite, not ranked"),
        ((2.0, 2.0), (2.0, 2.0), False, "within noise (0.0, standard error 0.0)"),
        ((3.0, 3.0), (2.0, 2.0), False, "worse (+1.0, standard error 0.0)"),
        ((3.0, 3.0), (2.0, 2.0), True, "better (+1.0, standard error 0.0)"),
    ],
)
def test_words(one, other, higher, words):
    assert against(Spread(one), Spread(other), higher_is_better=higher) == words
