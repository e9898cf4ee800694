"""What steps of drawn loops cost: probabilities of counts, how they grow, and FLOPs.

See docs/sampled_loops.md. What is drawn is in training/loop_sampler.py.
"""

from __future__ import annotations

import math

import numpy as np

from looped_jax.config.registry import LOOP_DISTRIBUTIONS
from looped_jax.config.resolved import ModelConfig
from looped_jax.config.settings import LoopSamplingConfig
from looped_jax.model import flops

POINTS = 1_000  # places along a run where its mean is taken


def step_flops(model: ModelConfig, loops: float, backward: float) -> float:
    """Training FLOPs per token of a step of `loops` loops, `backward` of them with gradients.

    A loop is worth three forward passes with gradients and one without; see model/flops.py.
    """
    more = (loops - model.loops) + 2 * (backward - model.loops)
    return flops.count(model).flops + more * flops.loop(model)


def run_flops(model: ModelConfig, sampling: LoopSamplingConfig, *, rows: int) -> float:
    """Training FLOPs per token, the mean over a run and all that could be drawn.

    `rows` end together: of counts that each draws for itself they all cost the largest.
    """
    if not sampling.on:
        return flops.count(model).flops
    found = probabilities(sampling, model.loops)
    if sampling.per == "sequence":
        found = np.diff(np.cumsum(found) ** rows, prepend=0.0)
    counts, longest = np.arange(1, len(found) + 1), sampling.longest(model.loops)
    spent, backward, end = 0.0, 0.0, sampling.curriculum_share
    for place in (np.arange(POINTS) + 0.5) / POINTS:
        loops = grown(counts, growth(sampling.curriculum, place, end))
        last = grown(longest, growth(sampling.backward_curriculum, place, end))
        spent += float(loops @ found) / POINTS
        backward += float(np.minimum(loops, last) @ found) / POINTS
    return step_flops(model, spent, backward)


def probabilities(sampling: LoopSamplingConfig, loops: int) -> np.ndarray:
    """Of 1, 2, … loops in a step of full depth, float64 [N]; `loops` is model.loops."""
    return LOOP_DISTRIBUTIONS[sampling.distribution]().probabilities(sampling, loops)


def growth(curriculum: str, done: float, end: float) -> float:
    """The share of full depth after `done` of the `end` steps, or shares, in which it grows."""
    if curriculum == "none" or done >= end:
        return 1.0
    return {"linear": done / end, "sqrt": 1 - math.sqrt(1 - done / end), "switch": 0.0}[curriculum]


def grown(counts: np.ndarray | int, share: float) -> np.ndarray:
    """Loop counts of a step at that share of full depth."""
    return np.maximum(1, np.ceil(share * np.asarray(counts))).astype(int)
