"""A task: where the rows that a model is trained on come from, and how it is judged.

Training knows no task by name: text is one of them. To try another, register it, here or in a file
of your own: it is then a choice of `data.task`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from looped_jax.config.resolved import Config
from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.model.transformer import Params
from looped_jax.runtime.sharding import EVERYTHING, Shard
from looped_jax.training.metric_log import EvaluationResult
from looped_jax.training.run_meta import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Rows(Protocol):
    """Endless rows for training, batch by batch, from a position that can be kept as JSON.

    A batch is int32 [rows, T + 1] of text, where each token is the target of the one before, or a
    dict of arrays [rows, …] as model/objectives/base.py describes it.
    """

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]:
        """The position of the next batch."""
        ...

    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Judge(Protocol):
    """Scores weights on the task's validation rows, in one pass for all loop counts."""

    def __call__(self, params: Params) -> Scores:
        """By metric and loop count. By the first metric checkpoints are judged; lower is better."""
        ...

    def describe(self, scores: Scores) -> str:
        """One line for the console."""
        ...


class Evaluation(Protocol):
    """Looks at weights beside validation, every so many steps and at the end.

    every: steps between two looks; 0: only at the end
    """

    every: int

    def __call__(self, params: Params, step: int) -> EvaluationResult:
        """What it sees after `step`; all processes call it together."""
        ...


class Task(abc.ABC):
    """Base of all tasks, made from the settings of a run. Raises DataError or ConfigError.

    vocab_size: entries of the vocabulary
    modes: what `looped-jax evaluate` can measure: methods of evaluation.evaluator.Evaluator
    """

    vocab_size: int
    modes: ClassVar[tuple[str, ...]] = ("validation",)

    @abc.abstractmethod
    def __init__(self, settings: Settings):
        """Open what the rows are made of, and check it."""

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, dict]:
        """What two runs on the same rows share, ready for JSON: "data", and more if there is."""

    @abc.abstractmethod
    def train_rows(self, config: Config, *, batch_size: int, shard: Shard = EVERYTHING) -> Rows:
        """This shard of all rows, `batch_size` at a time."""

    def row_shapes(self, config: Config) -> Any:
        """Shape and type of one row of a training batch: a tree of jax.ShapeDtypeStruct."""
        return jax.ShapeDtypeStruct((config.model.seq_len + 1,), np.int32)

    def remap_positions(self, positions: list[dict[str, Any]], shard: Shard) -> dict[str, Any]:
        """Where `shard` goes on after another number of shards that stood at `positions`."""
        raise ConfigError(
            f"data.task of {len(positions)} hosts cannot go on on {shard.count}; start as many"
        )

    def epochs(self, position: dict[str, Any], shard: Shard) -> float | None:
        """How often the data have been read where the rows of `shard` are at `position`.

        None: they have no end, or nobody knows.
        """
        return None

    def metrics(self, position: dict[str, Any]) -> dict[str, float]:
        """What is logged of every step, where this shard's rows end at `position`."""
        return {}

    @abc.abstractmethod
    def judge(
        self, config: Config, mesh: Mesh, *, loop_counts: tuple[int, ...], shard: Shard = EVERYTHING
    ) -> Judge:
        """Of at most train.eval_tokens targets, the same ones whatever the mesh."""

    def evaluations(
        self, config: Config, mesh: Mesh, *, loop_counts: tuple[int, ...]
    ) -> list[Evaluation]:
        """What else the weights are tried at. Asked for before anything is compiled.

        Raises ConfigError or DataError for what is asked for and cannot be had.
        """
        if config.train.core_every:
            raise ConfigError(
                f"train.core_every={config.train.core_every}: CORE is for text, not for "
                f"data.task={config.data.task}; leave it out"
            )
        return [Samples(self, config, mesh)]

    def save(self, run_dir: Path) -> None:  # noqa: B027 - a task may have nothing to save
        """Put what a trained model needs, as a tokenizer, into its folder."""

    def trained_model(
        self, config: Config, params: Params, *, step: int, mesh: Mesh
    ) -> TrainedModel:
        """The model as `looped_jax.load` would open it."""
        return TrainedModel(config, params, None, step=step, mesh=mesh)

    @staticmethod
    def figure(
        scores: Mapping[str, Sequence[float | None]], loops: Sequence[int], *, trained: int
    ) -> Figure:
        """Scores of a checkpoint, a value per loop count and metric, drawn for `evaluate`."""
        from looped_jax.plotting import figures  # matplotlib, only where something is drawn

        return figures.against_loops(scores, loops, trained=trained)

    @classmethod
    def validation_batches(
        cls, model: TrainedModel, *, loops: int, batch_size: int, most: int, data: str | None = None
    ) -> list[dict[str, np.ndarray]]:
        """Rows to diagnose a trained model on, of at most `most` targets, `batch_size` at a time.

        Batches {inputs [B, T], targets [B, T] or, for each of 1 … `loops` loops, [B, loops, T]},
        targets < 0 where nothing is owed. `data` is what --data names. Raises UserError.
        """
        raise ConfigError(
            f"data.task={model.config.data.task} does not say which rows it is diagnosed on; give "
            "its class a method validation_batches, see looped_jax/tasks/task.py"
        )

    @classmethod
    def decode(cls, model: TrainedModel, tokens: Sequence[int]) -> str:
        """How tokens read on a page."""
        return " ".join(map(str, tokens))

    def samples(self, model: TrainedModel) -> list[str]:
        """Lines that show what a model does; all processes call it together."""
        return []

    def what_next(self, config: Config) -> dict[str, list[str]]:
        """What to run on the complete run of `config`: programs with their flags, by what for."""
        return {}


class Samples:
    """The lines of Task.samples, every train.sample_every steps."""

    def __init__(self, task: Task, config: Config, mesh: Mesh):
        self.every = config.train.sample_every
        self._task, self._config, self._mesh = task, config, mesh

    def __call__(self, params: Params, step: int) -> EvaluationResult:
        model = self._task.trained_model(self._config, params, step=step, mesh=self._mesh)
        lines = self._task.samples(model)
        return EvaluationResult(
            [f"sample: {line}" for line in lines],
            texts={"samples": "\n".join(lines)} if lines else {},
        )
