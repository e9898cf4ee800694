"""Checkpoints of the PyTorch reference into run folders of ours and back, bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from looped_jax import files
from looped_jax.config.resolved import ModelConfig as JaxModelConfig
from looped_jax.config.settings import ModelSettings, Settings, TrainSettings
from looped_jax.model import transformer
from looped_jax.resolve import resolve
from looped_jax.training import checkpoint
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.run_folder import read_config
from torch_ref import checkpoint_files, names
from torch_ref.checkpoint_files import ConvertError
from torch_ref.config import FIXED, ModelConfig


def from_reference(
    run_dir: Path, out: Path, *, step: int | None = None, tokenizer: Path | None = None,
    dtype: str = "float32",
) -> int:  # fmt: skip
    """Write `out`, a run folder of one checkpoint; its step. Raises ConvertError.

    `tokenizer` is a tokenizer.json or tokenizer.pkl, by default the one beside the checkpoint, if
    any; without one the folder gives logits but no text. `dtype` is what it will compute in.
    """
    checkpoint_files.check_new(out)
    found = checkpoint_files.read(run_dir, step)
    try:
        model = ModelConfig.from_reference(found.meta)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConvertError(f"{found.meta_path}: {error}") from error
    checkpoint_files.check_tensors(found.weights, expected_shapes(model), found.path)
    words = checkpoint_files.tokenizer_json(tokenizer, [run_dir])
    arrays = {name: tensor.float().numpy() for name, tensor in found.weights.items()}
    params = {n: np.ascontiguousarray(a) for n, a in names.from_reference(arrays).items()}
    settings = Settings(model=jax_model(model, dtype), train=TrainSettings(run_dir=str(out)))
    checkpoint_files.write_run(
        out, resolve(settings), params, found, loops=model.loops, tokenizer=words
    )
    return found.step


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the reference's layout."""
    config = jax_model(model, "float32")
    shapes = transformer.init_shapes(config)
    hollow = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in shapes.items()}
    return {name: array.shape for name, array in names.to_reference(hollow).items()}


def jax_model(model: ModelConfig, dtype: str) -> JaxModelConfig:
    """Our configuration of the same model."""
    return JaxModelConfig(**dataclasses.asdict(model), dtype=dtype)


def to_reference(run_dir: Path, out: Path, *, step: int | None = None) -> int:
    """Write `out`/model_{step}.pt and meta_{step}.json, and the tokenizer.json; the step.

    A tensor that came from the reference as bfloat16 goes back as that while its values still are;
    trained further, it is float32. Raises ConvertError or CheckpointError.
    """
    checkpoint_files.check_new(out)
    config = read_config(run_dir)
    if parts := config.model.parts.on():
        raise ConvertError(
            f"{run_dir} has the parts {', '.join(parts)}, which the reference does not have; "
            "a model without them can be converted"
        )
    if config.model.embedding != "separate":
        raise ConvertError(
            f"{run_dir} has model.embedding={config.model.embedding}, which the reference does not "
            "have; a model with separate matrices can be converted"
        )
    for name in FIXED:
        if getattr(config.model, name) != (value := getattr(ModelSettings(), name)):
            raise ConvertError(
                f"{run_dir} has model.{name}={getattr(config.model, name)}, and the reference "
                f"always {value}; a model with that can be converted"
            )
    fields = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(ModelConfig)}
    model = ModelConfig(**fields)
    shapes = transformer.init_shapes(config.model)
    step, params = checkpoint.load_params(run_dir, shapes, step=step)
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        record = checkpoints.meta(step)
    origin = record.reference or {"meta": {}, "dtypes": {}}
    arrays = names.to_reference({name: np.asarray(array) for name, array in params.items()})
    weights = checkpoint_files.narrowed(arrays, origin["dtypes"])
    meta = {"step": step, **origin["meta"]}
    meta["model_config"] = origin["meta"].get("model_config", model.to_reference())
    with files.new_folder(out) as part:
        checkpoint_files.write(part, step, weights, meta)
        if (run_dir / "tokenizer.json").is_file():
            text = (run_dir / "tokenizer.json").read_text("utf-8")
            files.write_text(part / "tokenizer.json", text)
    return step
