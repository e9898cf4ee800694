"""The folder of a run: config.json, tokenizer.json, checkpoints/, metrics.jsonl, tensorboard/."""

from __future__ import annotations

import json
import os
from pathlib import Path

from looped_jax import files
from looped_jax.config.resolved import Config
from looped_jax.config.settings import Settings
from looped_jax.errors import CheckpointError, ConfigError
from looped_jax.resolve import resolve


def write_config(run_dir: str | os.PathLike[str], config: Config) -> None:
    files.write_text(Path(run_dir) / "config.json", json.dumps(config.to_dict(), indent=1))


def read_config(run_dir: str | os.PathLike[str]) -> Config:
    """Raises CheckpointError for a folder without one, and for one that cannot be used."""
    folder = Path(run_dir)
    try:
        return resolve(Settings.from_dict(json.loads((folder / "config.json").read_text("utf-8"))))
    except OSError as error:
        raise CheckpointError(
            f"{folder} is no run folder (config.json is missing); "
            "give one, as runs/FLT_K4_L2_END_D128"
        ) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder} is damaged: config.json: {error}") from error
    except ConfigError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
