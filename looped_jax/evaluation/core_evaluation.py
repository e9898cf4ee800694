"""CORE of a model that is being trained, at all loop counts from one pass."""

from __future__ import annotations

import time
from pathlib import Path

from jax.sharding import Mesh

from looped_jax.config.resolved import Config
from looped_jax.data.tokenizer import Tokenizer
from looped_jax.errors import DataError
from looped_jax.evaluation import core, scoring
from looped_jax.model.transformer import Params
from looped_jax.training.metric_log import EvaluationResult


class CoreEvaluation:
    """The tasks of the bundle, at most train.core_examples of each, every train.core_every steps.

    Few examples make it noisy, and other shots are drawn than for all of them: compare it with
    itself, and finished models by `looped_jax.evaluate`.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, mesh: Mesh, *, loop_counts: tuple[int, ...]
    ):
        """Read data.core_bundle, else the cache's, and try one example of each task.

        Raises DataError without a bundle, and core's errors for one that cannot be used.
        """
        folder = Path(config.data.core_bundle or core.cached_bundle())
        if not (folder / "core.yaml").is_file():
            raise DataError(
                f"train.core_every={config.train.core_every}: no CORE bundle at {folder}; download "
                "it into the cache with `looped-jax download core`, or name its folder as "
                "data.core_bundle"
            )
        self.every = config.train.core_every
        self._config, self._tokenizer, self._mesh = config, tokenizer, mesh
        self._loop_counts, self._bundle = loop_counts, core.load_bundle(folder)
        self._max_len = scoring.longest_row(config.model)
        for task in self._bundle.tasks:
            drawn = core.draw(task, config.train.core_examples)
            core.rows(drawn, 0, tokenizer.encode, tokenizer.bos_id, self._max_len)

    def __call__(self, params: Params, step: int) -> EvaluationResult:
        """core/mean_loops_k, and core/<task>_loops_k for every task: accuracy above guessing."""
        began, train = time.perf_counter(), self._config.train
        scorer = scoring.SpanScorer(
            self._config.model,
            params,
            self._mesh,
            loop_counts=self._loop_counts,
            batch_size=train.batch_size,
        )
        try:
            results = core.evaluate_tasks(
                self._bundle,
                self._tokenizer.encode,
                self._tokenizer.bos_id,
                scorer,
                loop_counts=self._loop_counts,
                max_len=self._max_len,
                max_per_task=train.core_examples,
            )
        except core.PromptError as error:  # an example is no reason to lose a run
            return EvaluationResult([f"CORE could not be scored: {error}"])
        named = [("mean", core.core_mean(results)), *((r.name, r.centered) for r in results)]
        mean = ", ".join(
            f"{value:.4f} at {k} loops"
            for k, value in zip(self._loop_counts, named[0][1], strict=True)
        )
        examples, seconds = sum(len(r.correct) for r in results), time.perf_counter() - began
        return EvaluationResult(
            [f"CORE: {mean} ({len(results)} tasks, {examples:,} examples, {seconds:.0f} s)"],
            {
                f"core/{name}_loops_{k}": value
                for name, values in named
                for k, value in zip(self._loop_counts, values.tolist(), strict=True)
            },
        )
