"""Tasks whose rows are generated: each row follows from a seed and its number alone.

So neither meshes, hosts and workers nor the place where a run was resumed change which rows a step
sees. Training draws the rows of its own seed; what is judged is the same for all runs of a task.
"""

from __future__ import annotations

import abc
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from looped_jax.config.registry import OBJECTIVES
from looped_jax.config.resolved import Config
from looped_jax.config.setting_tree import plain
from looped_jax.config.settings import Settings
from looped_jax.data.worker_processes import in_workers
from looped_jax.errors import ArgumentError, ConfigError
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.runtime.sharding import EVERYTHING, Shard
from looped_jax.tasks.accuracy import Accuracy
from looped_jax.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALIDATION = 0  # seed of the rows that are judged; training's are train.seed + 1
AS_IN_TRAINING = 2**60  # number of the first judged row that is no row to test with


class Row(NamedTuple):
    """One row of T tokens, and what is owed at each of them.

    inputs: [T] whole numbers, as all others; those of batches are int32
    targets: [T], −1 where nothing is owed; or [N, T], after each of N loop counts
    difficulty: [T] of the answer that is owed, −1 where nothing is
    answers: [T] number of that answer, where one has several tokens; by default each its own
    """

    inputs: np.ndarray
    targets: np.ndarray
    difficulty: np.ndarray
    answers: np.ndarray | None = None

    @classmethod
    def of_tokens(
        cls, tokens: np.ndarray, answers: np.ndarray, difficulty: np.ndarray, *, length: int
    ) -> Row:
        """A row in which each token is the target of the one before, filled up behind with 0.

        tokens: [n], n ≤ length + 1; answers, difficulty: [n] of each token, −1 where it is not owed
        """

        def filled(values: np.ndarray, fill: int) -> np.ndarray:
            return np.pad(values, (0, length - len(values)), constant_values=fill)

        owed = np.where(answers < 0, -1, tokens)
        return cls(
            filled(tokens[:-1], 0),
            *(filled(values[1:], -1) for values in (owed, difficulty, answers)),
        )


class GeneratedTask(Task):
    """Base of generated tasks, which are judged by exact answers.

    settings: the task's own, from data.tasks; length: T, tokens of a row
    difficulty: what the difficulty of an answer counts, as "distance"; None: all are alike
    target_per_loop: whether every loop owes an answer of its own
    """

    difficulty: ClassVar[str | None] = None
    target_per_loop: ClassVar[bool] = False
    length: int

    def __init__(self, settings: Settings):
        self.name, model = settings.data.task, settings.model
        self.settings: Any = settings.data.tasks[self.name]
        self.vocab_size, self.length = self.sizes()
        if model.seq_len != self.length:
            raise ConfigError(
                f"model.seq_len={model.seq_len}: a row of data.task={self.name} has {self.length} "
                f"tokens with its settings; give model.seq_len={self.length}, and as "
                "train.tokens_per_step a multiple of it"
            )
        if self.target_per_loop and model.loops > 1:
            read = OBJECTIVES[model.loss]().loops(model)
            if len(read) == 1:
                raise ConfigError(
                    f"model.loss={model.loss} reads one loop of {model.loops}, and "
                    f"data.task={self.name} owes an answer after every loop; give model.loss=STEP"
                )

    @abc.abstractmethod
    def sizes(self) -> tuple[int, int]:
        """Entries of the vocabulary, and tokens of a row. Raises ConfigError for its settings."""

    @abc.abstractmethod
    def row(self, random: np.random.Generator, *, test: bool, loops: Sequence[int]) -> Row:
        """A row to train on, or one to test with.

        `loops` are the loop counts after which an answer is asked for; a task that owes the same
        one after any number of loops need not look at them.
        """

    def word(self, token: int) -> str:
        """How a token reads in tables and figures."""
        return str(token)

    def fingerprint(self) -> dict[str, dict]:
        return {"data": {"task": self.name, **plain(self.settings)}}

    def train_rows(
        self, config: Config, *, batch_size: int, shard: Shard = EVERYTHING
    ) -> GeneratedRows:
        loops = tuple(k + 1 for k in config.model.scored_loops())
        rows = self._rows(config.train.seed + 1, test=False, loops=loops).map(_trained_on)
        mine = rows.slice(slice(shard.index, None, shard.count)).batch(batch_size)
        return GeneratedRows(mine, workers=config.data.workers, prefetch=config.data.prefetch)

    def row_shapes(self, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        loops = (len(config.model.scored_loops()),) if self.target_per_loop else ()
        shapes = {"inputs": (self.length,), "targets": (*loops, self.length)}
        return {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}

    def remap_positions(self, positions: list[dict[str, Any]], shard: Shard) -> dict[str, Any]:
        return positions[0]  # a step's rows are the same for any number of hosts

    def judge(
        self, config: Config, mesh: Mesh, *, loop_counts: tuple[int, ...], shard: Shard = EVERYTHING
    ) -> Accuracy:
        most = config.train.eval_tokens
        return Accuracy(
            config,
            mesh,
            test=self.validation_rows(test=True, loops=loop_counts, most=most),
            trained=self.validation_rows(test=False, loops=loop_counts, most=most),
            loop_counts=loop_counts,
            difficulty=self.difficulty,
        )

    @classmethod
    def figure(
        cls, scores: Mapping[str, Sequence[float | None]], loops: Sequence[int], *, trained: int
    ) -> Figure:
        from looped_jax.plotting import figures  # matplotlib, only where something is drawn

        prefix = f"accuracy_{cls.difficulty}_"
        by_difficulty = {
            int(name.removeprefix(prefix)): of
            for name, of in scores.items()
            if name.startswith(prefix)
        }
        return figures.accuracy(
            {"test": scores["accuracy"], "as in training": scores["accuracy_trained"]},
            by_difficulty,
            loops,
            trained=trained,
            difficulty=cls.difficulty or "",
        )

    @classmethod
    def validation_batches(
        cls, model: TrainedModel, *, loops: int, batch_size: int, most: int, data: str | None = None
    ) -> list[dict[str, np.ndarray]]:
        if data is not None:
            raise ArgumentError(
                f"--data={data} is for text, and data.task={model.config.data.task} generates its "
                "rows; leave it out"
            )
        rows = cls(model.config).validation_rows(test=True, loops=range(1, loops + 1), most=most)
        batches = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
        return [
            {
                name: np.stack([getattr(row, name) for row in batch])
                for name in ("inputs", "targets")
            }
            for batch in batches
        ]

    @classmethod
    def decode(cls, model: TrainedModel, tokens: Sequence[int]) -> str:
        return " ".join(map(cls(model.config).word, tokens))

    def validation_rows(self, *, test: bool, loops: Sequence[int], most: int) -> list[Row]:
        """Rows to test with, or rows as in training, of at most `most` tokens that are owed.

        Raises ConfigError where one row has more.
        """
        rows = self._rows(VALIDATION, test=test, loops=tuple(loops))
        found, left = [], most
        for number in itertools.count(0 if test else AS_IN_TRAINING):
            row = rows[number]
            owed = int(np.count_nonzero(row.difficulty >= 0))
            if owed > left:
                break
            found.append(row)
            left -= owed
        if not found:
            raise ConfigError(
                f"train.eval_tokens={most} is less than the {owed} targets of one row of "
                f"data.task={self.name}; give more"
            )
        return found

    def what_next(self, config: Config) -> dict[str, list[str]]:
        run = ["--checkpoint", config.train.run_dir]
        tokens = ["--tokens", str(config.train.eval_tokens)]
        by = f" and {self.difficulty}" if self.difficulty else ""
        return {
            f"accuracy by loops{by}, drawn": ["evaluate", *run],
            "what every loop does": ["diagnose", *run, *tokens],
        }

    def _rows(self, seed: int, *, test: bool, loops: tuple[int, ...]) -> grain.MapDataset[Row]:
        """Endless rows, by number."""
        make = functools.partial(self._row, test=test, loops=loops)
        return grain.MapDataset.range(sys.maxsize).random_map(make, seed=seed)

    def _row(
        self, number: int, random: np.random.Generator, *, test: bool, loops: tuple[int, ...]
    ) -> Row:
        made = self.row(random, test=test, loops=loops)
        return jax.tree.map(lambda values: values.astype(np.int32), made)


def _trained_on(row: Row) -> dict[str, np.ndarray]:
    return {"inputs": row.inputs, "targets": row.targets}


class GeneratedRows:
    """Batches in their order, from any one on; its position is the number of the next batch."""

    def __init__(self, batches: grain.MapDataset, *, workers: int, prefetch: int):
        self._batches, self._workers, self._prefetch = batches, workers, prefetch
        self._source: grain.DatasetIterator | None = None
        self._batch = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._source is None:
            self._source = iter(self._from(self._batch))
        batch = next(self._source)
        self._batch += 1
        return batch

    def _from(self, batch: int) -> grain.IterDataset:
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)
        batches = self._batches.slice(slice(batch, None)).to_iter_dataset(ahead)
        if self._workers:
            batches = in_workers(batches, self._workers)
        return batches

    def get_state(self) -> dict[str, Any]:
        return {"batch": self._batch}

    def set_state(self, state: dict[str, Any]) -> None:
        self.close()
        self._batch = state["batch"]

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        self._source = None
