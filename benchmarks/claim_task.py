"""The claim's rows as a task: bytes in random crops, or the training pipeline's rows in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from looped_jax.config.options import at_least, one_of
from looped_jax.config.registry import TASKS
from looped_jax.config.resolved import Config
from looped_jax.config.setting_tree import plain
from looped_jax.config.settings import Settings
from looped_jax.data import corpus, pipeline, tokenizer
from looped_jax.data.corpus import Corpus
from looped_jax.evaluation import scoring
from looped_jax.model.transformer import Params
from looped_jax.runtime import sharding
from looped_jax.runtime.sharding import EVERYTHING, Shard
from looped_jax.tasks.task import Rows, Task
from looped_jax.training.run_meta import Scores


@dataclass(frozen=True)
class ClaimSettings:
    text: str = one_of(("bytes", "tokens"), "bytes", "random crops of bytes, or rows in order")
    characters: int = at_least(1, 64_000, "of the corpus that crops are taken from")


@TASKS.register("claim")
class ClaimText(Task):
    """The same text for every rule and loop count, judged by the loss on text held out."""

    Settings = ClaimSettings

    def __init__(self, settings: Settings):
        self.settings: ClaimSettings = settings.data.tasks["claim"]
        self._corpus = Corpus.open(settings.data)
        self._seq_len, self._batch_size = settings.model.seq_len, settings.train.batch_size
        if self.settings.text == "bytes":
            self.vocab_size = 256
        else:
            self._tokenizer = tokenizer.load_tokenizer(settings.data, self._corpus)
            self.vocab_size = self._tokenizer.vocab_size

    def fingerprint(self) -> dict[str, dict]:
        return {"data": {"task": "claim", **plain(self.settings), **self._corpus.fingerprint()}}

    def train_rows(self, config: Config, *, batch_size: int, shard: Shard = EVERYTHING) -> Rows:
        """By the seed of the run where they are crops. One process takes all rows."""
        if self.settings.text == "bytes":
            text = _characters(self._corpus.train, self.settings.characters)
            return Crops(text, self._seq_len + 1, batch_size, config.train.seed)
        rows = pipeline.train_rows(
            self._corpus, self._tokenizer, seq_len=self._seq_len, batch_size=batch_size
        )
        return iter(rows)

    def judge(
        self, config: Config, mesh: Mesh, *, loop_counts: tuple[int, ...], shard: Shard = EVERYTHING
    ) -> HeldOutLoss:
        return HeldOutLoss(config, mesh, self.held_out(), self.vocab_size, loop_counts)

    def held_out(self) -> np.ndarray:
        """Rows int32 [R, T + 1] that are never trained on, in whole batches."""
        size, rows = self._seq_len + 1, self._batch_size
        if self.settings.text == "bytes":
            text = _characters(self._corpus.val, 16 * size * rows)
            found = text[: len(text) // size * size].reshape(-1, size)
        else:
            batches = pipeline.val_rows(
                self._corpus, self._tokenizer, seq_len=self._seq_len, batch_size=rows,
                max_tokens=2**16,
            )  # fmt: skip
            whole = [np.c_[batch["inputs"], batch["targets"][:, -1:]] for batch in batches]
            found = np.concatenate([w[(w >= 0).all(axis=1)] for w in whole])
        return found[: len(found) // rows * rows]


class Crops:
    """Batches int32 [B, T + 1] of crops of a text, drawn from a seed."""

    def __init__(self, text: np.ndarray, size: int, rows: int, seed: int):
        self._text, self._size, self._rows, self._seed = text, size, rows, seed
        self.set_state({"batch": 0})

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        starts = self._starts()
        self._batch += 1
        return np.stack([self._text[start : start + self._size] for start in starts])

    def _starts(self) -> np.ndarray:
        return self._chance.integers(0, len(self._text) - self._size + 1, self._rows)

    def get_state(self) -> dict[str, Any]:
        return {"batch": self._batch}

    def set_state(self, state: dict[str, Any]) -> None:
        self._chance, self._batch = np.random.default_rng(self._seed), state["batch"]
        for _ in range(self._batch):
            self._starts()

    def close(self) -> None:
        pass


class HeldOutLoss:
    """Mean loss of held-out rows, nats per token."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        rows: np.ndarray,
        vocab_size: int,
        loop_counts: tuple[int, ...],
    ):
        self._mesh, self._loop_counts = mesh, loop_counts
        size = config.train.batch_size
        self._batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        self._ones = np.ones(vocab_size, np.int32)
        self._score = scoring.make_score_step(config.model, mesh, loop_counts)

    def __call__(self, params: Params) -> Scores:
        total, count = np.zeros(len(self._loop_counts)), 0
        ones = sharding.put(self._ones, self._mesh, P())
        for batch in self._batches:
            inputs, targets = (
                sharding.put(part, self._mesh, P(sharding.BATCH_AXES))
                for part in (batch[:, :-1], batch[:, 1:])
            )
            nats, tokens = jax.device_get(self._score(params, inputs, targets, ones))
            total, count = total + nats, count + int(tokens)
        return {"loss": dict(zip(self._loop_counts, (total / count).tolist(), strict=True))}

    def describe(self, scores: Scores) -> str:
        counts = ", ".join(f"{value:.4f} at {k} loops" for k, value in scores["loss"].items())
        return f"held-out loss: {counts}"


def _characters(shards: Sequence[Path], count: int) -> np.ndarray:
    """The first `count` bytes of the shards' documents, int32."""
    groups, parts, size = corpus.RowGroups(shards), [], 0
    for i in range(len(groups)):
        for text in groups[i]:
            parts.append(np.frombuffer((text + "\n").encode("utf-8"), np.uint8))
            size += len(parts[-1])
        if size >= count:
            break
    return np.concatenate(parts)[:count].astype(np.int32)
