"""The configuration of a run with every size known; looped_jax/resolve.py makes it."""

from __future__ import annotations

from dataclasses import dataclass

from looped_jax.config.options import either
from looped_jax.config.registry import OBJECTIVES
from looped_jax.config.settings import ModelSettings, Settings, TrainSettings
from looped_jax.errors import ArgumentError, ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelSettings):
    """The model's settings, and its sizes. Symbols: model/transformer.py."""

    width: int  # D
    heads: int  # H
    kv_heads: int  # G
    vocab_size: int  # V

    @property
    def head_dim(self) -> int:
        """Dh, the width of one head."""
        return self.head_width or self.width // self.heads

    @property
    def attention_width(self) -> int:
        """H · Dh, channels of all queries; D unless head_width says otherwise."""
        return self.heads * self.head_dim

    @property
    def padded_vocab(self) -> int:
        """V rounded up to a multiple of 64, the length of both embedding tables."""
        return -(-self.vocab_size // 64) * 64

    def windows(self) -> tuple[int | None, ...]:
        """Keys each layer can see, itself included; None is all. The last layer is always L."""
        short = self.short_window.keys(self.seq_len)
        kinds = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.layers)]
        kinds[-1] = "L"
        return tuple(short if kind == "S" else self.long_window for kind in kinds)

    def longest_row(self) -> int | None:
        """Tokens that a row may have at most, as its parts say; None: any number."""
        known = (self.parts[name].longest_row(self.seq_len) for name in self.parts.on())
        return min((length for length in known if length is not None), default=None)

    def check_row(self, length: int) -> None:
        """Raise ArgumentError for a row of more tokens than that."""
        known = self.longest_row()
        if known is not None and length > known:
            raise ArgumentError(
                f"a row of {length} tokens is longer than the {known} positions that the model "
                "has learned; give a shorter text, or ask for fewer tokens"
            )

    def scored_loops(self) -> tuple[int, ...]:
        """Zero-based loops whose states the objective reads."""
        return OBJECTIVES[self.loss]().loops(self)

    def read_outs(self) -> int:
        """How many states of a token the head reads for the objective."""
        return OBJECTIVES[self.loss]().read_outs(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainSettings):
    """The run's settings, its folder and its length."""

    run_dir: str
    steps: int


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Everything a run is."""

    model: ModelConfig
    train: TrainConfig


def micro_batches(config: Config, *, devices: int) -> int:
    """Micro-batches per optimizer step when `devices` devices share the batch.

    Raises ConfigError when tokens_per_step is no whole number of micro-batches.
    """
    t, seq_len = config.train, config.model.seq_len
    per_pass = t.batch_size * seq_len * devices
    if t.tokens_per_step % per_pass:
        below = t.tokens_per_step // per_pass * per_pass
        near = [n for n in (below, below + per_pass) if n]
        raise ConfigError(
            f"train.tokens_per_step={t.tokens_per_step} is no multiple of train.batch_size "
            f"{t.batch_size} × model.seq_len {seq_len} × {devices} batch devices = {per_pass}; "
            f"choose {either(near)}, or another train.batch_size"
        )
    return t.tokens_per_step // per_pass
