"""How many loops a training step runs: distributions over 1, 2, … loops.

A distribution says the probability of every count; draws, means and costs follow from that alone.
To try another, register it, here or in a file of your own: it is then a choice of
`train.loop_sampling.distribution`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import special

from looped_jax.config.options import at_least, setting
from looped_jax.config.registry import LOOP_DISTRIBUTIONS
from looped_jax.config.settings import LoopSamplingConfig
from looped_jax.errors import ConfigError

REACH = 8.0  # standard deviations that are followed; beyond them is less than 1e-14


class LoopDistribution:
    """Base of all distributions: model.loops, and nothing else."""

    Settings: ClassVar[type | None] = None

    def probabilities(self, sampling: LoopSamplingConfig, loops: int) -> np.ndarray:
        """Of 1, 2, … loops, float64 [N] that sums to 1; `loops` is model.loops."""
        return np.eye(loops)[-1]


@LOOP_DISTRIBUTIONS.register("fixed")
class Fixed(LoopDistribution):
    """model.loops in every step."""


@dataclass(frozen=True)
class UniformSettings:
    """The loop counts that are equally likely."""

    counts: tuple[int, ...] = setting((4, 6, 8, 12, 16), "loop counts, equally likely")


@LOOP_DISTRIBUTIONS.register("uniform")
class Uniform(LoopDistribution):
    """One of a few counts, each as likely as the others; model.loops has no part in it."""

    Settings = UniformSettings

    def probabilities(self, sampling: LoopSamplingConfig, loops: int) -> np.ndarray:
        counts = sampling.distributions["uniform"].counts
        if not counts or not all(isinstance(count, int) and count > 0 for count in counts):
            raise ConfigError(
                f"train.loop_sampling.distributions.uniform.counts={counts} must be whole numbers "
                "from 1; as 4,6,8"
            )
        return np.bincount(counts)[1:] / len(counts)


@LOOP_DISTRIBUTIONS.register("poisson")
class Poisson(LoopDistribution):
    """One loop and Poisson(model.loops − 1) more: the mean is model.loops."""

    def probabilities(self, sampling: LoopSamplingConfig, loops: int) -> np.ndarray:
        return _poisson(loops - 1.0)


@LOOP_DISTRIBUTIONS.register("truncated_poisson")
class TruncatedPoisson(LoopDistribution):
    """Poisson(model.loops), and one loop where that is none.

    Source: the recipe of Parcae, `poisson-truncated-full`, which draws for every sequence.
    """

    def probabilities(self, sampling: LoopSamplingConfig, loops: int) -> np.ndarray:
        none, one, *more = _poisson(float(loops))
        return np.array([none + one, *more])


@dataclass(frozen=True)
class LogNormalPoissonSettings:
    """The spread of the rate, and the longest count."""

    sigma: float = at_least(0.0, 0.5, "standard deviation of the rate's logarithm", high=2.0)
    most: int | None = at_least(1, None, "larger counts become this; by default none do")


@LOOP_DISTRIBUTIONS.register("log_normal_poisson")
class LogNormalPoisson(LoopDistribution):
    """One loop and Poisson(rate) more, where ln rate ~ N(ln model.loops − σ²/2, σ²).

    The mean is model.loops + 1, and long counts are likelier than of a Poisson. Source: Geiping et
    al., "Scaling up test-time compute with latent reasoning", 2025 (arXiv 2502.05171).
    """

    Settings = LogNormalPoissonSettings

    def probabilities(self, sampling: LoopSamplingConfig, loops: int) -> np.ndarray:
        own = sampling.distributions["log_normal_poisson"]
        # The trapezoidal rule over the normal variable: it converges faster than any power of the
        # step for what falls off like this.
        normal = np.linspace(-REACH, REACH, 1601)
        weights = np.exp(-np.square(normal) / 2)
        rates = loops * np.exp(own.sigma * normal - own.sigma**2 / 2)
        found = np.zeros(_longest(rates[-1]))
        for rate, weight in zip(rates, weights / weights.sum(), strict=True):
            part = _poisson(rate)
            found[: len(part)] += weight * part
        if own.most is not None and own.most < len(found):
            found = np.append(found[: own.most - 1], found[own.most - 1 :].sum())
        return found


def _poisson(rate: float) -> np.ndarray:
    """Probabilities of 0, 1, … of Poisson(rate), up to where nothing is left."""
    n = np.arange(_longest(rate))
    found = np.exp(special.xlogy(n, rate) - rate - special.gammaln(n + 1))
    return found / found.sum()


def _longest(rate: float) -> int:
    return math.ceil(rate + REACH * math.sqrt(rate) + 20)
