"""Presets: settings that go together, under any loop rule. The files in configs/ name them.

All settings, their meaning and their defaults stand in settings.py. A preset changes the few that
go together; `--config.group.setting=value` changes one on the command line.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from looped_jax.config.settings import default_config
from looped_jax.errors import ConfigError


def make(variant: str, preset: str | None) -> ConfigDict:
    """The settings of `variant` under `preset`: no preset is paper scale."""
    check(preset)
    config = default_config()
    PRESETS[preset or "paper"](config)
    config.model.variant = variant
    return config


def check(preset: str | None) -> None:
    """Raises ConfigError for a preset that there is not."""
    if preset and preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown; choose paper or tiny, or leave it out")


def paper(config: ConfigDict) -> None:
    """Paper scale: 127 M parameters, 2.54 B tokens of FineWeb-edu.

    Wants a GPU or TPU, the parquet shards of karpathy/fineweb-edu-100b-shuffle, and the
    tokenizer.json of Qwen/Qwen3-4B, in the places named here.
    """
    config.model.layers = 6  # width 384, 3 heads
    config.model.loops = 12
    config.model.seq_len = 1024
    config.data.path = "data/fineweb_edu"
    config.data.tokenizer = "data/qwen3/tokenizer.json"
    config.data.train_shards = 249
    config.data.workers = 4
    config.train.tokens_per_step = 524_288
    config.train.batch_size = 8


def tiny(config: ConfigDict) -> None:
    """Some minutes on two cores, offline, on real text that every machine has."""
    config.model.layers = 2
    config.model.loops = 4
    config.model.width = 128
    config.model.heads = 2
    config.model.seq_len = 128
    config.model.dtype = "float32"
    config.optim.newton_schulz_dtype = "float32"
    config.data.path = "builtin"
    config.train.steps = 500
    config.train.tokens_per_step = 4_096
    config.train.batch_size = 32
    config.train.eval_every = 100
    config.train.eval_tokens = 65_536
    config.train.eval_loops = (1, 2, 4, 8)
    config.train.save_every = 100
    config.train.sample_prompts = ("import os\n\ndef ", "class ", "Return the ", "for i in range(")


PRESETS = {"paper": paper, "tiny": tiny}
