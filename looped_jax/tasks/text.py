"""Text: rows of packed documents, judged by bits per byte.

Files of tokens whose text nobody knows are judged by nats per token.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from looped_jax import files
from looped_jax.config.registry import TASKS
from looped_jax.config.resolved import Config
from looped_jax.config.settings import Settings
from looped_jax.data import pipeline
from looped_jax.data.corpus import Corpus
from looped_jax.data.epochs import Epochs
from looped_jax.data.random_order import RandomOrder
from looped_jax.data.tokenizer import load_tokenizer
from looped_jax.errors import ArgumentError, ConfigError, UserError
from looped_jax.evaluation import bits_per_byte, scoring
from looped_jax.evaluation.core_evaluation import CoreEvaluation
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.model.transformer import Params
from looped_jax.runtime import distributed, sharding
from looped_jax.runtime.sharding import EVERYTHING, Shard
from looped_jax.tasks.task import Evaluation, Rows, Samples, Task
from looped_jax.training.run_meta import Scores


@TASKS.register("text")
class Text(Task):
    """The corpus and the tokenizer that the settings name."""

    modes = ("bpb", "sample", "core", "ppl")  # what may have to be downloaded comes last

    def __init__(self, settings: Settings):
        self.corpus = Corpus.open(settings.data)
        self.tokenizer = load_tokenizer(settings.data, self.corpus)
        if self.tokenizer:
            self.vocab_size = self.tokenizer.vocab_size
        else:
            self.vocab_size = self.corpus.token_files[0].format.vocab_size
            print(
                f"data.path: nobody says which tokenizer its {self.vocab_size} ids are of, so "
                "scores are nats per token and there is no text; data.tokenizer would",
                flush=True,
            )
        self.corpus.check_ids(self.vocab_size, self.tokenizer.start if self.tokenizer else None)
        order = RandomOrder if settings.data.order == "random" else Epochs
        self.order: Epochs | RandomOrder = order(
            self.corpus, self.tokenizer, settings.data, seq_len=settings.model.seq_len
        )

    def fingerprint(self) -> dict[str, dict]:
        words = self.tokenizer
        return {
            "data": self.corpus.fingerprint() | self.order.fingerprint(),
            "tokenizer": words.fingerprint() if words else {"vocab_size": self.vocab_size},
        }

    def train_rows(self, config: Config, *, batch_size: int, shard: Shard = EVERYTHING) -> Rows:
        rows = self.order.rows(
            batch_size=batch_size,
            index=shard.index,
            count=shard.count,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
        )
        return iter(rows)

    def remap_positions(self, positions: list[dict[str, Any]], shard: Shard) -> dict[str, Any]:
        return self.order.remap_positions(positions, index=shard.index, count=shard.count)

    def epochs(self, position: dict[str, Any], shard: Shard) -> float:
        return self.order.epochs(position, index=shard.index, count=shard.count)

    def metrics(self, position: dict[str, Any]) -> dict[str, float]:
        return self.order.metrics(position)

    def judge(
        self, config: Config, mesh: Mesh, *, loop_counts: tuple[int, ...], shard: Shard = EVERYTHING
    ) -> BitsPerByte:
        judge = BitsPerByte if self.tokenizer else NatsPerToken
        return judge(self, config, mesh, loop_counts, shard)

    def evaluations(
        self, config: Config, mesh: Mesh, *, loop_counts: tuple[int, ...]
    ) -> list[Evaluation]:
        self._check_samples(config)
        found: list[Evaluation] = [Samples(self, config, mesh)]
        if config.train.core_every:
            if not (self.tokenizer and self.tokenizer.start):
                raise ConfigError(
                    f"train.core_every={config.train.core_every}: CORE's prompts begin with a "
                    "start token, which these tokens have not; leave it out"
                )
            found.append(CoreEvaluation(config, self.tokenizer, mesh, loop_counts=loop_counts))
        return found

    def _check_samples(self, config: Config) -> None:
        """Raise ConfigError, before anything compiles, for samples that no model could write."""
        train = config.train
        if not (self.tokenizer and train.sample_tokens and train.sample_prompts):
            return
        try:
            longest = max(len(self.tokenizer.prompt(prompt)) for prompt in train.sample_prompts)
        except UserError as error:
            raise ConfigError(f"train.sample_prompts: {error}") from error
        try:
            config.model.check_row(longest + train.sample_tokens - 1)  # the last is not read
        except ArgumentError as error:
            raise ConfigError(
                f"train.sample_tokens={train.sample_tokens} and {longest} of a prompt: {error}"
            ) from error

    def save(self, run_dir: Path) -> None:
        if self.tokenizer:
            files.write_text(run_dir / "tokenizer.json", self.tokenizer.to_json())

    def trained_model(
        self, config: Config, params: Params, *, step: int, mesh: Mesh
    ) -> TrainedModel:
        return TrainedModel(config, params, self.tokenizer, step=step, mesh=mesh)

    @classmethod
    def validation_batches(
        cls, model: TrainedModel, *, loops: int, batch_size: int, most: int, data: str | None = None
    ) -> list[dict[str, np.ndarray]]:
        corpus = Corpus.to_judge(model.config.data, data)
        tokenizer = model.tokenizer if model.has_text else None
        judged = dataclasses.replace(corpus, train=())
        judged.check_ids(model.config.model.vocab_size, tokenizer.start if tokenizer else None)
        return pipeline.val_rows(
            corpus,
            tokenizer,
            seq_len=model.config.model.seq_len,
            batch_size=batch_size,
            max_tokens=most,
        )

    @classmethod
    def decode(cls, model: TrainedModel, tokens: Sequence[int]) -> str:
        return (
            model.tokenizer.decode(list(tokens))
            if model.has_text
            else super().decode(model, tokens)
        )

    def samples(self, model: TrainedModel) -> list[str]:
        train = model.config.train
        if not (self.tokenizer and train.sample_tokens and train.sample_prompts):
            return []
        texts = model.generate(
            train.sample_prompts,
            tokens=train.sample_tokens,
            temperature=train.sample_temperature,
            seed=train.seed,
        )
        pairs = zip(train.sample_prompts, texts, strict=True)
        return [f"{prompt!r}\n{textwrap.indent(prompt + text, '    ')}" for prompt, text in pairs]

    def what_next(self, config: Config) -> dict[str, list[str]]:
        train, more = config.train, 2 * config.model.loops
        run = ["--checkpoint", train.run_dir]
        counts = ",".join(map(str, sorted({*train.eval_loops, config.model.loops, more})))
        prompt = next((["--prompt", p] for p in train.sample_prompts if p.isprintable()), [])
        modes = "bpb,sample" if self.tokenizer else "bpb"
        judged = ["--modes", modes, "--eval_tokens", str(train.eval_tokens)]
        if train.sample_tokens and config.model.longest_row() is not None:  # by default too many
            prompt = [*prompt, "--tokens", str(train.sample_tokens)]
        text = {f"text from {more} loops": ["generate", *run, *prompt, "--loops", str(more)]}
        speaks = self.tokenizer and ("--prompt" in prompt or self.tokenizer.start)
        return {
            **(text if speaks else {}),
            "what every loop does": ["diagnose", *run],
            "scores and samples by loops": ["evaluate", *run, "--loops", counts, *judged],
        }


class BitsPerByte:
    """Judges by the text for validation; its figure for comparison is the best unigram model's.

    Gives "bpb", which checkpoints are judged by, and "ppl" of the same targets.
    """

    def __init__(
        self, text: Text, config: Config, mesh: Mesh, loop_counts: tuple[int, ...], shard: Shard
    ):
        self._mesh, self._loop_counts = mesh, loop_counts
        self._token_bytes = bits_per_byte.bytes_of(text.tokenizer, text.vocab_size)
        self._batches = pipeline.val_rows(
            text.corpus,
            text.tokenizer,
            seq_len=config.model.seq_len,
            batch_size=config.train.batch_size * sharding.batch_devices(mesh) // shard.count,
            max_tokens=config.train.eval_tokens,
            shard_index=shard.index,
            shard_count=shard.count,
        )
        self._score = scoring.make_score_step(config.model, mesh, loop_counts)
        counts = bits_per_byte.count_targets(self._batches, text.vocab_size)
        self._counts = distributed.process_sum(counts)
        self._unigram = bits_per_byte.unigram_bits_per_byte(self._counts, self._token_bytes)

    def __call__(self, params: Params) -> Scores:
        found = bits_per_byte.bits_per_byte(
            self._score,
            params,
            self._batches,
            self._token_bytes,
            loop_counts=self._loop_counts,
            mesh=self._mesh,
        )
        per_token = {
            k: bits_per_byte.perplexity(bits, self._counts, self._token_bytes)
            for k, bits in found.items()
        }
        return {"bpb": found, "ppl": per_token}

    def describe(self, scores: Scores) -> str:
        counts = ", ".join(f"{value:.4f} at {k} loops" for k, value in scores["bpb"].items())
        per_token = ", ".join(f"{value:.2f}" for value in scores["ppl"].values())
        return (
            f"bits per byte: {counts} (best unigram model of these tokens: {self._unigram:.4f}); "
            f"perplexity per token: {per_token}"
        )


class NatsPerToken(BitsPerByte):
    """Judges tokens whose bytes nobody knows: "nats", the mean loss, and "ppl"."""

    def __call__(self, params: Params) -> Scores:
        found = super().__call__(params)
        return {"nats": {k: b * math.log(2) for k, b in found["bpb"].items()}, "ppl": found["ppl"]}

    def describe(self, scores: Scores) -> str:
        counts = ", ".join(f"{value:.4f} at {k} loops" for k, value in scores["nats"].items())
        best = self._unigram * math.log(2)
        return f"nats per token: {counts} (best unigram model of these tokens: {best:.4f})"
