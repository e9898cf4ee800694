"""Exact answers: how many there are by loop count and by difficulty, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from looped_jax.config.resolved import Config
from looped_jax.evaluation import scoring
from looped_jax.model.transformer import Params
from looped_jax.runtime import sharding
from looped_jax.training.run_meta import Scores


class Judged(Protocol):
    """A row with what is owed; see generated.Row."""

    @property
    def inputs(self) -> np.ndarray: ...
    @property
    def targets(self) -> np.ndarray: ...
    @property
    def difficulty(self) -> np.ndarray: ...
    @property
    def answers(self) -> np.ndarray | None: ...


class Accuracy:
    """Judges weights by rows to test with, and by rows as in training.

    An answer is right if each of its tokens is the likeliest after the right tokens before it.
    Gives "error_trained", the share of wrong answers in rows as in training, which checkpoints are
    judged by: at the trained loop count harder rows may be out of reach for any weights. Then
    "accuracy" of the test rows, "accuracy_trained", and accuracy_<difficulty>_<d> of the test rows'
    answers of difficulty d, for each that occurs.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        *,
        test: Sequence[Judged],
        trained: Sequence[Judged],
        loop_counts: tuple[int, ...],
        difficulty: str | None,
    ):
        """`difficulty` is what it counts, for names; None: all answers are alike.

        Every process holds all rows; each of its devices takes a share of them.
        """
        self._mesh, self._loop_counts, self._difficulty = mesh, loop_counts, difficulty
        self._trained_loops = config.model.loops
        rows = [*test, *trained]
        inputs = np.stack([row.inputs for row in rows])
        targets = np.stack([row.targets for row in rows])
        self._targets = targets if targets.ndim == 3 else targets[:, None]  # [R, N or 1, T]
        size = config.train.batch_size * sharding.batch_devices(mesh)
        self._batches = [
            (_filled(inputs[at : at + size], size, 0), _filled(targets[at : at + size], size, -1))
            for at in range(0, len(rows), size)
        ]
        owed = self._targets[:, 0] >= 0
        time = inputs.shape[1]
        answers = np.stack(
            [np.arange(time) if row.answers is None else row.answers for row in rows]
        )
        of_row = np.arange(len(rows))[:, None]
        _, first, self._answer = np.unique(
            (of_row * time + answers)[owed], return_index=True, return_inverse=True
        )
        self._owed = owed
        self._of_difficulty = np.stack([row.difficulty for row in rows])[owed][first]
        self._of_test = np.broadcast_to(of_row < len(test), owed.shape)[owed][first]
        self._score = scoring.make_hit_step(config.model, mesh, loop_counts)

    def __call__(self, params: Params) -> Scores:
        right = self._right(params)
        trained = right[:, ~self._of_test].mean(axis=1)
        found = {
            "error_trained": 1 - trained,
            "accuracy": right[:, self._of_test].mean(axis=1),
            "accuracy_trained": trained,
        }
        if self._difficulty is not None:
            for d in np.unique(self._of_difficulty[self._of_test]).tolist():
                mine = self._of_test & (self._of_difficulty == d)
                found[f"accuracy_{self._difficulty}_{d}"] = right[:, mine].mean(axis=1)
        return {
            name: dict(zip(self._loop_counts, values.tolist(), strict=True))
            for name, values in found.items()
        }

    def _right(self, params: Params) -> np.ndarray:
        """Which answers are right after each of N loop counts, bool [N, answers]."""
        rows, spec, hits = len(self._owed), P(sharding.BATCH_AXES), []
        for inputs, targets in self._batches:
            arguments = (sharding.put(array, self._mesh, spec) for array in (inputs, targets))
            hits.append(jax.device_get(self._score(params, *arguments)))
        missed = ~np.concatenate(hits, axis=1)[:, :rows][:, self._owed]  # [N, tokens owed]
        wrong = np.zeros((len(missed), len(self._of_test)), bool)
        for of_loop, misses in zip(wrong, missed, strict=True):
            of_loop[self._answer[misses]] = True
        return ~wrong

    def describe(self, scores: Scores) -> str:
        k, prefix = self._trained_loops, f"accuracy_{self._difficulty}_"
        counts = ", ".join(f"{value:.4f} at {n}" for n, value in scores["accuracy"].items())
        each = ", ".join(
            f"{name.removeprefix(prefix)}: {of[k]:.2f}"
            for name, of in scores.items()
            if name.startswith(prefix)
        )
        by = f", and by {self._difficulty} {each}" if each else ""
        return (
            f"accuracy by loops: {counts}; with {k} loops {scores['accuracy_trained'][k]:.4f} on "
            f"rows as in training{by}"
        )


def _filled(rows: np.ndarray, size: int, value: int) -> np.ndarray:
    """`rows` [n, …] with rows of `value` behind them, `size` in all."""
    padding = [(0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
    return np.pad(rows, padding, constant_values=value)
