"""nanochat's checkpoints into run folders of ours and back, bit for bit.

A folder of nanochat's, NANOCHAT_BASE_DIR, holds base_checkpoints/d12/ and others, which hold
`model_{step}.pt` and `meta_{step}.json`, and tokenizer/ with its pickled tiktoken Encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from looped_jax import files
from looped_jax.config.resolved import Config, ModelConfig
from looped_jax.config.settings import PERFORMANCE, Settings, TrainSettings
from looped_jax.data.tokenizer import read_tokenizer
from looped_jax.model import transformer
from looped_jax.resolve import resolve
from looped_jax.training import checkpoint
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.run_folder import read_config
from torch_ref import checkpoint_files, nanochat_names
from torch_ref.checkpoint_files import ConvertError
from torch_ref.tiktoken_writer import to_tokenizer_pickle

_FIELDS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_OLDEST_WINDOWS = "L"  # of checkpoints that are older than the setting
# What says how weights start, and what a converted model computes in, are no part of the model.
_FREE = (
    *(f"model.{name}" for name in (*PERFORMANCE, "dtype", "width_per_layer", "head_width", "loss")),
    "model.init.", "model.rules.", "model.embeddings.", "model.objectives.",
)  # fmt: skip
_STARTS = ("_first", "_last", ".start", "_bound", ".table_scale")


def from_nanochat(
    run_dir: Path, out: Path, *, step: int | None = None, tokenizer: Path | None = None,
    dtype: str = "float32",
) -> int:  # fmt: skip
    """Write `out`, a run folder of one checkpoint with one loop; its step. Raises ConvertError.

    `tokenizer` is by default the one beside the checkpoint, else that of the base directory;
    without one the folder gives logits but no text. `dtype` is what it will compute in. Checkpoints
    of nanochat's speedruns of February and July 2026 are told apart by their weights.
    """
    checkpoint_files.check_new(out)
    found = checkpoint_files.read(run_dir, step)
    described = _description(found.meta_path, found.meta)
    release = nanochat_names.release_of(found.weights)
    model = nanochat_names.model_settings(described, release, dtype=dtype)
    config = resolve(Settings(model=model, train=TrainSettings(run_dir=str(out))))
    checkpoint_files.check_tensors(found.weights, _shapes(config.model), found.path)
    words = checkpoint_files.tokenizer_json(
        tokenizer, [run_dir, run_dir.resolve().parent.parent / "tokenizer"]
    )
    arrays = {name: tensor.float().numpy() for name, tensor in found.weights.items()}
    params = nanochat_names.from_nanochat(arrays)
    params = {name: np.ascontiguousarray(array) for name, array in params.items()}
    checkpoint_files.write_run(out, config, params, found, loops=1, tokenizer=words)
    return found.step


def to_nanochat(run_dir: Path, out: Path, *, step: int | None = None) -> Path:
    """Write `out`, a base directory of nanochat's; its folder of the checkpoint.

    The model has to be one of nanochat's, with one loop, trained here or there. A tensor that came
    as bfloat16 goes back as that while its values still are. Raises ConvertError, CheckpointError.
    """
    checkpoint_files.check_new(out)
    config = read_config(run_dir)
    described = _check(run_dir, config)
    step, params = checkpoint.load_params(run_dir, transformer.init_shapes(config.model), step=step)
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        record = checkpoints.meta(step)
    origin = record.reference or {"meta": {}, "dtypes": {}}
    arrays = nanochat_names.to_nanochat({name: np.asarray(a) for name, a in params.items()})
    meta = {"step": step, **origin["meta"]}
    meta["model_config"] = origin["meta"].get("model_config", described)
    if record.score is not None and not origin["meta"]:
        meta["val_bpb"] = record.score
    place = Path("base_checkpoints") / f"d{config.model.layers}"
    with files.new_folder(out) as part:
        (part / place).mkdir(parents=True)
        weights = checkpoint_files.narrowed(arrays, origin["dtypes"])
        checkpoint_files.write(part / place, step, weights, meta)
        if (words := run_dir / "tokenizer.json").is_file():
            (part / "tokenizer").mkdir()
            files.write_bytes(part / "tokenizer" / "tokenizer.pkl", to_tokenizer_pickle(words))
            lengths = read_tokenizer(words, bos_token=None).token_bytes
            torch.save(torch.from_numpy(lengths), part / "tokenizer" / "token_bytes.pt")
    return out / place


def _description(path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """nanochat's model_config, checked. Raises ConvertError."""
    described = meta.get("model_config")
    if not isinstance(described, dict):
        raise ConvertError(f"{path} holds no model_config; it says what the model is")
    known = {"window_pattern": _OLDEST_WINDOWS} | described
    if wrong := [f for f in _FIELDS if type(known.get(f)) is not int or known[f] < 1]:
        raise ConvertError(
            f"{path}: model_config.{wrong[0]}={known.get(wrong[0])!r} is no count from 1; "
            "correct it"
        )
    if lookup := known.get("l3_after_layers"):
        raise ConvertError(
            f"{path}: l3_after_layers={lookup!r}, and lookup layers have no counterpart here"
        )
    lookups = [name for name in known if name.startswith("l3_")]  # of no effect without
    if unknown := sorted(set(known) - {*_FIELDS, "window_pattern", *lookups}):
        raise ConvertError(
            f"{path}: model_config has unknown fields {unknown}, which may change the model"
        )
    return known


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of nanochat's layout."""
    shapes = transformer.init_shapes(model)
    hollow = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in shapes.items()}
    return {name: array.shape for name, array in nanochat_names.to_nanochat(hollow).items()}


def _check(run_dir: Path, config: Config) -> dict[str, Any]:
    """nanochat's model_config of a run's model. Raises ConvertError where there is none."""
    model = config.model
    if model.loops != 1:
        raise ConvertError(
            f"{run_dir} has model.loops={model.loops}, and nanochat has no loops; "
            "a model of one can be converted"
        )
    described = dict(
        sequence_len=model.seq_len, vocab_size=model.vocab_size, n_layer=model.layers,
        n_head=model.heads, n_kv_head=model.kv_heads, n_embd=model.width,
        window_pattern=model.window_pattern,
    )  # fmt: skip
    release = "head" if "smear" in model.parts.on() else "seed"
    own = nanochat_names.model_settings(described, release)
    theirs = resolve(Settings(model=own, train=config.train)).leaves()
    for key, value in config.leaves().items():
        if key.startswith("model.parts.carried_scale") or not key.startswith("model."):
            continue  # which is of loops
        free = key.startswith(_FREE) or key.endswith(_STARTS)
        off = key.startswith("model.parts.") and not key.endswith(".on")
        off = off and key.split(".")[2] not in model.parts.on()
        if not free and not off and value != theirs[key]:
            raise ConvertError(
                f"{run_dir} has {key}={value!r}, where nanochat's model has {theirs[key]!r}; "
                "only its own can be converted"
            )
    if model.head_dim * model.heads != model.width:
        raise ConvertError(
            f"{run_dir} has model.head_width={model.head_width} for {model.heads} heads, which are "
            f"not the width {model.width} together, as nanochat's are"
        )
    return described
