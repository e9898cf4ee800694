"""Checkpoints and tokenizers of the PyTorch reference, into ours and back, bit for bit.

    looped-jax convert from-reference RUN_DIR OUT_DIR [--step N] [--tokenizer FILE]
    looped-jax convert to-reference DIR OUT_DIR [--step N]
    looped-jax convert tokenizer tokenizer.pkl tokenizer.json
    looped-jax convert tokenizer tokenizer.json tokenizer.pkl

RUN_DIR holds `model_{step}.pt`, whole or in shards, and `meta_{step}.json`. What comes out is a
run folder for `looped_jax.load`, or the reference's layout again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import torch

from looped_jax import cli, files
from looped_jax.config.resolved import ModelConfig as JaxModelConfig
from looped_jax.config.settings import ModelSettings, Settings, TrainSettings
from looped_jax.data.tokenizer import read_tokenizer
from looped_jax.errors import UserError
from looped_jax.model import transformer
from looped_jax.resolve import resolve
from looped_jax.training import checkpoint
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.run_folder import read_config, write_config
from looped_jax.training.run_meta import RunMeta
from looped_jax.training.train_state import TrainState
from torch_ref import names
from torch_ref.config import FIXED, ModelConfig
from torch_ref.tiktoken_reader import to_tokenizer_json
from torch_ref.tiktoken_writer import to_tokenizer_pickle

Weights = dict[str, torch.Tensor]
PREFIXES = ("_orig_mod.", "module.")  # of compiled and of data-parallel runs
WRAPPERS = ("model", "state_dict", "model_state_dict")
EXACT_IN_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


class ConvertError(UserError, ValueError):
    """What cannot be converted; the message names the file or tensor and the mend."""


# ---- the reference's side ------------------------------------------------------------------------


def read_reference(run_dir: Path, step: int | None) -> tuple[int, ModelConfig, dict, Weights]:
    """Step, model, whole meta and weights of a checkpoint, the last by default.

    Loads tensors alone (`weights_only`). Raises ConvertError.
    """
    files: dict[int, list[Path]] = {}
    for path in sorted(run_dir.glob("model_*.pt")):
        if found := re.fullmatch(r"model_(\d+)(?:[._-].*)?", path.stem):
            files.setdefault(int(found[1]), []).append(path)
    if not files or (step is not None and step not in files):
        raise ConvertError(
            f"{run_dir} holds no model_*.pt" + (f" of step {step}" if files else "")
            + (f"; choose one of {sorted(files)}" if files else "; give the folder of a run")
        )  # fmt: skip
    step = max(files) if step is None else step
    metas = [p for p in run_dir.glob("meta_*.json") if p.stem.split("_")[1] in (
        str(step), f"{step:06d}")]  # fmt: skip
    if not metas:
        raise ConvertError(f"{run_dir} holds no meta_{step:06d}.json; it says what the model is")
    try:
        meta = json.loads(metas[0].read_text(encoding="utf-8"))
        model = ModelConfig.from_reference(meta)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConvertError(f"{metas[0]}: {error}") from error
    weights: Weights = {}
    for path in files[step]:
        for name, tensor in read_tensors(path).items():
            if name in weights and not torch.equal(weights[name], tensor):
                raise ConvertError(
                    f"{path}: {name} is in another shard too, with other values; join slices first"
                )
            weights[name] = tensor
    check_tensors(weights, expected_shapes(model), files[step][0])
    return step, model, meta, weights


def read_tensors(path: Path) -> Weights:
    """The tensors of one file under plain names, whatever wraps or prefixes them."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else "empty"
        raise ConvertError(
            f"{path} is damaged or holds more than tensors ({reason}); save a plain state dict"
        ) from None
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConvertError(f"{path} holds no state dict; save model.state_dict()")
    plain: Weights = {}
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConvertError(f"{path}: {name} is {type(tensor).__name__}, no tensor; remove it")
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        plain[name] = tensor
    return plain


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the reference's layout."""
    config = jax_model(model, "float32")
    shapes = transformer.init_shapes(config)
    hollow = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in shapes.items()}
    return {name: array.shape for name, array in names.to_reference(hollow).items()}


def check_tensors(weights: Weights, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise ConvertError that names every tensor that is missing, extra, misshapen or too wide."""
    wrong = [f"{name} is missing" for name in shapes if name not in weights]
    wrong += [f"{name} is extra" for name in weights if name not in shapes]
    for name in [n for n in shapes if n in weights]:
        found, dtype = tuple(weights[name].shape), weights[name].dtype
        if found != shapes[name]:
            wrong.append(f"{name} has shape {found}, not {shapes[name]}")
        elif dtype not in EXACT_IN_FLOAT32:
            wrong.append(f"{name} is {dtype}, which float32 cannot hold exactly")
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ConvertError(
            f"{path} does not fit its meta: {'; '.join(wrong[:6])}{more}; correct model_config"
        )


# ---- from the reference to ours ------------------------------------------------------------------


def from_reference(
    run_dir: Path, out: Path, *, step: int | None = None, tokenizer: Path | None = None,
    dtype: str = "float32",
) -> int:  # fmt: skip
    """Write `out`, a run folder of one checkpoint; its step. Raises ConvertError.

    `tokenizer` is a tokenizer.json or tokenizer.pkl, by default the one beside the checkpoint, if
    any; without one the folder gives logits but no text. `dtype` is what it will compute in.
    """
    check_new(out)
    step, model, meta, weights = read_reference(run_dir, step)
    words = tokenizer_json(run_dir, tokenizer)
    arrays = {name: tensor.float().numpy() for name, tensor in weights.items()}
    params = {n: np.ascontiguousarray(a) for n, a in names.from_reference(arrays).items()}
    settings = Settings(model=jax_model(model, dtype), train=TrainSettings(run_dir=str(out)))
    config = resolve(settings)
    bpb = meta.get("val_bpb")
    record = RunMeta(
        step=step,
        scores={} if bpb is None else {"bpb": {model.loops: bpb}},
        config=config.to_dict(),
        fingerprint={"converted": f"weights of {run_dir.name}, without optimizer or data position"},
        reference={
            "meta": meta,
            "dtypes": {name: str(t.dtype).removeprefix("torch.") for name, t in weights.items()},
        },
    )
    with files.new_folder(out) as part:
        write_config(part, config)
        if words is not None:
            files.write_text(part / "tokenizer.json", words)
            found = read_tokenizer(part / "tokenizer.json", bos_token=None)
            if found.vocab_size > model.vocab_size:
                raise ConvertError(
                    f"the tokenizer has {found.vocab_size} entries, the model {model.vocab_size}; "
                    "give the tokenizer it was trained with as --tokenizer"
                )
        with Checkpoints(part) as checkpoints:
            state = TrainState(params, optimizer=(), step=np.int32(step))
            checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state), record)
    return step


def jax_model(model: ModelConfig, dtype: str) -> JaxModelConfig:
    return JaxModelConfig(**dataclasses.asdict(model), dtype=dtype)


def tokenizer_json(run_dir: Path, given: Path | None) -> str | None:
    """The text of a tokenizer.json from the given file, or the one in `run_dir`, or None."""
    beside = [run_dir / name for name in ("tokenizer.json", "tokenizer.pkl")]
    path = given or next((p for p in beside if p.is_file()), None)
    if path is None:
        return None
    try:
        return to_tokenizer_json(path) if path.suffix == ".pkl" else path.read_text("utf-8")
    except OSError as error:
        raise ConvertError(f"--tokenizer={path} cannot be read ({error.strerror})") from error


# ---- from ours to the reference ------------------------------------------------------------------


def to_reference(run_dir: Path, out: Path, *, step: int | None = None) -> int:
    """Write `out`/model_{step}.pt and meta_{step}.json, and the tokenizer.json; the step.

    A tensor that came from the reference as bfloat16 goes back as that while its values still are;
    trained further, it is float32. Raises ConvertError or CheckpointError.
    """
    check_new(out)
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
    with Checkpoints(run_dir) as checkpoints:
        record = checkpoints.meta(step)
    origin = record.reference or {"meta": {}, "dtypes": {}}
    arrays = names.to_reference({name: np.asarray(array) for name, array in params.items()})
    weights = {
        name: narrowed(torch.from_numpy(np.array(array)), origin["dtypes"].get(name, "float32"))
        for name, array in arrays.items()
    }
    meta = {"step": step, **origin["meta"]}
    meta["model_config"] = origin["meta"].get("model_config", model.to_reference())
    with files.new_folder(out) as part:
        torch.save(weights, part / f"model_{step:06d}.pt")
        files.write_json(part / f"meta_{step:06d}.json", meta, indent=1)
        if (run_dir / "tokenizer.json").is_file():
            text = (run_dir / "tokenizer.json").read_text("utf-8")
            files.write_text(part / "tokenizer.json", text)
    return step


def narrowed(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """`tensor` in the remembered type, if that holds every value of it."""
    narrow = tensor.to(getattr(torch, dtype))
    return narrow if torch.equal(narrow.float(), tensor) else tensor


def convert_tokenizer(file: Path, out: Path) -> None:
    """A tokenizer.pkl of nanochat as tokenizer.json, or the other way, by the endings."""
    check_new(out)
    match file.suffix, out.suffix:
        case ".pkl", ".json":
            files.write_text(out, to_tokenizer_json(file))
        case ".json", ".pkl":
            files.write_bytes(out, to_tokenizer_pickle(file))
        case _:
            raise ConvertError(f"{file} to {out}: give a .pkl and a .json, or a .json and a .pkl")


def check_new(out: Path) -> None:
    if out.exists():
        raise ConvertError(f"{out} exists already; give a new folder, so that nothing is lost")
    if not os.access(next(p for p in out.resolve().parents if p.exists()), os.W_OK):
        raise ConvertError(f"{out} cannot be made, its parent is not writable; give another")


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("convert", argv))


def run(args: argparse.Namespace) -> None:
    try:
        if args.command == "tokenizer":
            convert_tokenizer(args.file, args.out)
            print(f"written: {args.out}")
        elif args.command == "from-reference":
            step = from_reference(
                args.run_dir, args.out, step=args.step, tokenizer=args.tokenizer, dtype=args.dtype
            )
            print(f"written: {args.out}, step {step}; looped_jax.load({str(args.out)!r}) opens it")
        else:
            step = to_reference(args.run_dir, args.out, step=args.step)
            print(f"written: {args.out}/model_{step:06d}.pt and meta_{step:06d}.json")
    except (UserError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
