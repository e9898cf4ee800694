"""Settings and runs of the claim's experiment; see benchmarks/claim.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from looped_jax.config.resolved import Config
from looped_jax.config.settings import ModelSettings, OptimConfig, Settings, TrainSettings
from looped_jax.resolve import resolve


@dataclass(frozen=True)
class Setting:
    """One experiment.

    text: "bytes", the first `characters` of the corpus, in random crops; or "tokens", the training
    pipeline's rows in order
    rates: further runs (rule, K, multiplier of all learning rates)
    equal_flops: also one loop for as many FLOPs as the largest loop count takes
    """

    layers: int
    width: int
    heads: int
    seq_len: int
    batch_size: int
    steps: int
    text: str
    loops: tuple[int, ...] = (1, 3, 6, 9, 12)
    rules: tuple[str, ...] = ("FLT", "FLT_res", "LT_ia", "LT_i", "LT")
    seeds: tuple[int, ...] = (1, 2, 3)
    rates: tuple[tuple[str, int, float], ...] = ()
    equal_flops: bool = False
    characters: int = 64_000
    data: str = "builtin"
    dtype: str = "float32"

    def config(self, run: Run, vocab_size: int) -> Config:
        model = ModelSettings(
            variant=run.rule, layers=self.layers, loops=run.loops, width=self.width,
            heads=self.heads, seq_len=self.seq_len, dtype=self.dtype,
        )  # fmt: skip
        plain = OptimConfig()
        rates = dataclasses.replace(
            plain,
            matrix_learning_rate=run.rate * plain.matrix_learning_rate,
            embedding_learning_rate=run.rate * plain.embedding_learning_rate,
            head_learning_rate=run.rate * plain.head_learning_rate,
            warmdown_ratio=0.0,
        )
        train = TrainSettings(
            seed=run.seed,
            steps=run.steps,
            tokens_per_step=self.batch_size * self.seq_len,
            batch_size=self.batch_size,
        )
        return resolve(Settings(model=model, optim=rates, train=train), vocab_size=vocab_size)


@dataclass(frozen=True)
class Run:
    """One training run of a setting. With one loop all rules are the same: it is run as FLT."""

    rule: str
    loops: int
    seed: int
    rate: float = 1.0
    steps: int = 0
