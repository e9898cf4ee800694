"""What the host draws for the rows of every training step, and adds to the batch.

It follows from train.seed, the step and the row's number in the step, and from nothing else. So a
resumed run, another mesh and other micro-batches draw the same, and every device is told the same.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from looped_jax.config.resolved import Config
from looped_jax.model import random_numbers
from looped_jax.runtime.sharding import EVERYTHING, Shard
from looped_jax.training.loop_sampler import LoopSampler

SEEDS = 1  # which of Philox's streams; loop counts are drawn from the first, 0


class RowDraws:
    """Loop counts and seeds of rows; a batch without either passes as it is. Raises ConfigError.

    loops: see LoopSampler
    """

    def __init__(self, config: Config, shard: Shard = EVERYTHING):
        self.loops = LoopSampler(config)
        self._seeded = random_numbers.in_training(config.model)
        self._seed, self._shard = config.train.seed, shard
        self._rows = config.train.tokens_per_step // config.model.seq_len

    def row_shapes(self, shapes: Any) -> Any:
        """Shapes of one row of a batch, from those that the task gives."""
        if not (columns := self.columns(step=1)):
            return shapes
        if not isinstance(shapes, dict):
            tokens = jax.ShapeDtypeStruct((shapes.shape[0] - 1,), shapes.dtype)
            shapes = {"inputs": tokens, "targets": tokens}
        return shapes | {n: jax.ShapeDtypeStruct((), of.dtype) for n, of in columns.items()}

    def join(self, batch: Any, step: int) -> Any:
        """The batch of `step` with a column for everything that is drawn.

        Rows are those of this shard: the index-th of every count rows of the step.
        """
        if not (columns := self.columns(step)):
            return batch
        if not isinstance(batch, dict):
            batch = {"inputs": batch[:, :-1], "targets": batch[:, 1:]}
        mine = slice(self._shard.index, None, self._shard.count)
        return batch | {name: column[mine] for name, column in columns.items()}

    def columns(self, step: int) -> dict[str, np.ndarray]:
        """Of all rows of a step [rows]: see LoopSampler.columns, and uint32 "seeds" where anything
        draws random numbers; see model/random_numbers.py. Steps count from 1."""
        seeds = {"seeds": self.seeds(step)} if self._seeded else {}
        return self.loops.columns(step) | seeds

    def seeds(self, step: int) -> np.ndarray:
        """uint32 [rows]"""
        philox = np.random.Philox(key=(self._seed, step), counter=(0, 0, 0, SEEDS))
        return np.random.Generator(philox).integers(2**32, size=self._rows, dtype=np.uint32)
