"""Files that PyTorch programs of nanochat's family leave: model_{step}.pt and meta_{step}.json.

Tensors are read, and nothing else of a file is unpickled.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from looped_jax import files
from looped_jax.config.resolved import Config
from looped_jax.data.tokenizer import read_tokenizer
from looped_jax.errors import UserError
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.run_folder import write_config
from looped_jax.training.run_meta import RunMeta
from looped_jax.training.train_state import TrainState
from torch_ref.tiktoken_reader import to_tokenizer_json

Weights = dict[str, torch.Tensor]
PREFIXES = ("_orig_mod.", "module.")  # of compiled and of data-parallel runs
WRAPPERS = ("model", "state_dict", "model_state_dict")
EXACT_IN_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


class ConvertError(UserError, ValueError):
    """What cannot be converted; the message names the file or tensor and the mend."""


class CheckpointFiles(NamedTuple):
    """One checkpoint as it was found.

    step: optimizer steps taken; meta: of `meta_path`, whole; weights: of `path`, the first of them
    """

    step: int
    path: Path
    meta_path: Path
    meta: dict[str, Any]
    weights: Weights


def read(run_dir: Path, step: int | None) -> CheckpointFiles:
    """The checkpoint of a step, the last by default, from one file or from shards.

    Loads tensors alone (`weights_only`). Raises ConvertError.
    """
    found: dict[int, list[Path]] = {}
    for path in sorted(run_dir.glob("model_*.pt")):
        if name := re.fullmatch(r"model_(\d+)(?:[._-].*)?", path.stem):
            found.setdefault(int(name[1]), []).append(path)
    if not found or (step is not None and step not in found):
        raise ConvertError(
            f"{run_dir} holds no model_*.pt" + (f" of step {step}" if found else "")
            + (f"; choose one of {sorted(found)}" if found else "; give the folder of a run")
        )  # fmt: skip
    step = max(found) if step is None else step
    metas = [p for p in run_dir.glob("meta_*.json") if p.stem.split("_")[1] in (
        str(step), f"{step:06d}")]  # fmt: skip
    if not metas:
        raise ConvertError(f"{run_dir} holds no meta_{step:06d}.json; it says what the model is")
    try:
        meta = json.loads(metas[0].read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"{metas[0]}: {error}") from error
    weights: Weights = {}
    for path in found[step]:
        for name, tensor in read_tensors(path).items():
            if name in weights and not torch.equal(weights[name], tensor):
                raise ConvertError(
                    f"{path}: {name} is in another shard too, with other values; join slices first"
                )
            weights[name] = tensor
    return CheckpointFiles(step, found[step][0], metas[0], meta, weights)


def load(path: Path, *, otherwise: str) -> Any:
    """What a file of PyTorch holds, of tensors and plain values alone: no code of it runs.

    Raises ConvertError with what to do `otherwise` for a file that is missing, damaged or more.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConvertError(
            f"{path} cannot be read ({error.strerror or error}); {otherwise}"
        ) from None
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else "empty"
        raise ConvertError(
            f"{path} is damaged or holds more than tensors and plain values ({reason}); {otherwise}"
        ) from None


def read_tensors(path: Path) -> Weights:
    """The tensors of one file under plain names, whatever wraps or prefixes them."""
    loaded = load(path, otherwise="save a plain state dict")
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


def check_tensors(
    weights: Weights, shapes: Mapping[str, tuple[int, ...]], path: Path, *,
    meta: str = "its meta", mend: str = "model_config",
) -> None:  # fmt: skip
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
            f"{path} does not fit {meta}: {'; '.join(wrong[:6])}{more}; correct {mend}"
        )


def write_run(
    out: Path,
    config: Config,
    params: Mapping[str, np.ndarray],
    found: CheckpointFiles,
    *,
    loops: int,
    tokenizer: str | None,
) -> None:
    """A run folder of one checkpoint, without optimizer or data position.

    loops: that the score of its meta is of; tokenizer: text of a tokenizer.json; without one the
    folder gives logits but no text. Raises ConvertError for one of more entries than the model.
    """
    bpb = found.meta.get("val_bpb")
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in found.weights.items()}
    source = found.path.parent.name
    record = RunMeta(
        step=found.step,
        scores={} if bpb is None else {"bpb": {loops: bpb}},
        config=config.to_dict(),
        fingerprint={"converted": f"weights of {source}, without optimizer or data position"},
        reference={"meta": found.meta, "dtypes": dtypes},
    )
    with files.new_folder(out) as part:
        write_config(part, config)
        if tokenizer is not None:
            files.write_text(part / "tokenizer.json", tokenizer)
            size = read_tokenizer(part / "tokenizer.json", bos_token=None).vocab_size
            if size > config.model.vocab_size:
                raise ConvertError(
                    f"the tokenizer has {size} entries, the model {config.model.vocab_size}; "
                    "give the tokenizer it was trained with as --tokenizer"
                )
        with Checkpoints(part) as checkpoints:
            state = TrainState(dict(params), optimizer=(), step=np.int32(found.step))
            checkpoints.save(found.step, jax.tree.map(jax.numpy.asarray, state), record)


def tokenizer_json(given: Path | None, folders: list[Path]) -> str | None:
    """The text of a tokenizer.json from the given file, or of the first in `folders`, or None."""
    names = ("tokenizer.json", "tokenizer.pkl")
    near = [folder / name for folder in folders for name in names]
    path = given or next((p for p in near if p.is_file()), None)
    if path is None:
        return None
    try:
        return to_tokenizer_json(path) if path.suffix == ".pkl" else path.read_text("utf-8")
    except OSError as error:
        raise ConvertError(f"--tokenizer={path} cannot be read ({error.strerror})") from error


def narrowed(arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> Weights:
    """Tensors of the remembered types where those hold every value of them, else of float32."""
    return {name: _narrowed(array, dtypes.get(name, "float32")) for name, array in arrays.items()}


def _narrowed(array: np.ndarray, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(array))
    narrow = tensor.to(getattr(torch, dtype))
    return narrow if torch.equal(narrow.float(), tensor) else tensor


def write(folder: Path, step: int, weights: Weights, meta: Mapping[str, Any]) -> None:
    """model_{step}.pt and meta_{step}.json."""
    torch.save(weights, folder / f"model_{step:06d}.pt")
    files.write_json(folder / f"meta_{step:06d}.json", dict(meta), indent=1)


def check_new(out: Path) -> None:
    """Raise ConvertError for what is there already, or cannot be made."""
    if out.exists():
        raise ConvertError(f"{out} exists already; give a new folder, so that nothing is lost")
    if not os.access(next(p for p in out.resolve().parents if p.exists()), os.W_OK):
        raise ConvertError(f"{out} cannot be made, its parent is not writable; give another")
