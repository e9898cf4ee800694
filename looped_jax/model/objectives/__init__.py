"""The objectives that come with this package, each in a file; see model/objectives/base.py."""

from looped_jax.model.objectives import (
    exit_gate,
    fixed_point,
    random_loops,
    self_weighted,
    weighted,
)
from looped_jax.model.objectives.base import Batch, Objective, batch_of, count, of
from looped_jax.model.objectives.scored_loops import End, Few, Step

__all__ = [
    "Batch", "End", "Few", "Objective", "Step", "batch_of", "count", "exit_gate", "fixed_point",
    "of", "random_loops", "self_weighted", "weighted",
]  # fmt: skip
