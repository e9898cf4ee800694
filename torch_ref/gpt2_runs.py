"""GPT-2's checkpoints, and nanoGPT's, into run folders of ours and back, bit for bit.

A folder of GPT-2 is the hub's: config.json, model.safetensors or its shards with their index, and a
tokenizer as tokenizer.json or as vocab.json with merges.txt. nanoGPT leaves ckpt.pt, of which
tensors and plain values are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from looped_jax import files
from looped_jax.config.resolved import Config, ModelConfig
from looped_jax.config.settings import PERFORMANCE, Settings, TrainSettings
from looped_jax.data import gpt2_tokenizer
from looped_jax.data.tokenizer import read_tokenizer
from looped_jax.model import transformer
from looped_jax.resolve import resolve
from looped_jax.training import checkpoint
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.run_folder import read_config
from torch_ref import checkpoint_files, gpt2_names, hub_model
from torch_ref.checkpoint_files import CheckpointFiles, ConvertError, Weights
from torch_ref.gpt2_names import PREFIX, Description

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # without an owner, of openai-community
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_INDEX, _SHARD = f"{_WEIGHTS}.index.json", re.compile(r"model-\d+-of-\d+\.safetensors")
_WORDS = ("tokenizer.json", "vocab.json", "merges.txt")
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # of older files: what is causal, no weight
_REFUSED = {  # fields of config.json that make another model of it, and what they have to be
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# What says how weights start, what a model computes in and what it is trained with.
_FREE = (
    *(f"model.{name}" for name in (*PERFORMANCE, "dtype", "loss", "seq_len", "variant")),
    "model.width_per_layer", "model.head_width", "model.short_window.", "model.init.",
    "model.rules.", "model.embeddings.", "model.objectives.", "model.rope.base", "model.rope.dtype",
    "model.qk.scale", "model.latent_rank", "model.parts.dropout.",
    "model.parts.attention_dropout.", "model.parts.learned_positions.",
    "model.parts.biases.attention",
)  # fmt: skip


def from_gpt2(
    where: str, out: Path, *, tokenizer: Path | None = None, dtype: str = "float32",
    endpoint: str | None = None, **settings: Any,
) -> int:  # fmt: skip
    """Write `out`, a run folder of one checkpoint with one loop; its step, 0. Raises ConvertError.

    `where` is a folder or a model of the hub, as gpt2 or OWNER/NAME, downloaded from `endpoint`
    with fetch's `settings`. Dropout is as in its config.json.
    """
    checkpoint_files.check_new(out)
    folder = Path(where)
    if not folder.is_dir():
        name = f"openai-community/{where}" if where in NAMES else where
        folder = hub_model.download(name, _wanted, endpoint=endpoint, **settings)
    config = _read_json(folder / _CONFIG)
    described = _description(folder / _CONFIG, config)
    path, weights = _read_weights(folder)
    prefix = any(name.startswith(PREFIX) for name in weights)
    kept = _plain(weights, path)
    meta = {"config": config, "prefix": prefix}
    found = CheckpointFiles(0, path, folder / _CONFIG, meta, kept)
    _write(out, found, described, dtype, _tokenizer(tokenizer, folder), transposed=False)
    return 0


def from_nanogpt(
    file: Path, out: Path, *, tokenizer: Path | None = None, dtype: str = "float32"
) -> int:
    """Write `out` from nanoGPT's ckpt.pt; the step. Raises ConvertError.

    Its GELU is by erf, whatever it was trained from.
    """
    checkpoint_files.check_new(out)
    loaded = checkpoint_files.load(file, otherwise="give a ckpt.pt of nanoGPT")
    args = loaded.get("model_args") if isinstance(loaded, Mapping) else None
    if not isinstance(args, Mapping) or not isinstance(loaded.get("model"), Mapping):
        raise ConvertError(f"{file} holds no model and model_args; give a ckpt.pt of nanoGPT")
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    layers, heads, width, positions, vocab_size = (_count(file, args, name) for name in sizes)
    dropped = float(args.get("dropout", 0.0))
    described = Description(
        layers, heads, width, positions, vocab_size, activation="gelu",
        bias=bool(args.get("bias", True)), embedding_dropout=dropped, branch_dropout=dropped,
        attention_dropout=dropped,
    )  # fmt: skip
    weights = _plain(checkpoint_files.read_tensors(file), file)
    step = int(loaded.get("iter_num", 0))
    meta = {"model_args": dict(args), "prefix": True}
    found = CheckpointFiles(step, file, file, meta, weights)
    words = checkpoint_files.tokenizer_json(tokenizer, [file.parent])
    _write(out, found, described, dtype, words, transposed=True)
    return step


def to_gpt2(run_dir: Path, out: Path, *, step: int | None = None) -> Path:
    """Write `out`, a folder as transformers has them; itself. Raises ConvertError, CheckpointError.

    The model has to be GPT-2's, with one loop; biases that it has not, as of nanoGPT, are zeros.
    A tensor that came as another type goes back as that while its values still are.
    """
    checkpoint_files.check_new(out)
    config = read_config(run_dir)
    described = _check(run_dir, config)
    step, params = checkpoint.load_params(run_dir, transformer.init_shapes(config.model), step=step)
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        origin = checkpoints.meta(step).reference or {"meta": {}, "dtypes": {}}
    arrays = gpt2_names.to_gpt2(
        {name: np.asarray(array) for name, array in params.items()}, described.vocab_size
    )
    whole = {name: np.zeros(shape, np.float32) for name, shape in _shapes(config.model).items()}
    if not origin["meta"].get("prefix", True):
        arrays, whole = ({n.removeprefix(PREFIX): a for n, a in x.items()} for x in (arrays, whole))
    dtypes = origin["dtypes"] if "config" in origin["meta"] else {}
    tensors = checkpoint_files.narrowed({**whole, **arrays}, dtypes)
    words = run_dir / "tokenizer.json"
    with files.new_folder(out) as part:
        _save(tensors, part / _WEIGHTS)
        written = origin["meta"].get("config") or _config_json(described, words)
        files.write_json(part / _CONFIG, written, indent=2)
        if words.is_file():
            files.write_text(part / "tokenizer.json", words.read_text("utf-8"))
    return out


def _write(
    out: Path, found: CheckpointFiles, described: Description, dtype: str, words: str | None, *,
    transposed: bool,
) -> None:  # fmt: skip
    model = gpt2_names.model_settings(described, dtype=dtype)
    config = resolve(Settings(model=model, train=TrainSettings(run_dir=str(out))))
    shapes = _shapes(config.model, biased=described.bias, transposed=transposed)
    plain = {n.removeprefix(PREFIX): shape for n, shape in shapes.items()}
    told = "its model_args" if transposed else found.meta_path.name
    checkpoint_files.check_tensors(found.weights, plain, found.path, meta=told, mend=told)
    arrays = {name: tensor.float().numpy() for name, tensor in found.weights.items()}
    params = gpt2_names.from_gpt2(arrays, transposed=transposed)
    params = {name: np.ascontiguousarray(array) for name, array in params.items()}
    prefix = PREFIX if found.meta["prefix"] else ""
    named = {prefix + name: tensor for name, tensor in found.weights.items()}
    checkpoint_files.write_run(
        out, config, params, found._replace(weights=named), loops=1, tokenizer=words
    )


def _shapes(
    model: ModelConfig, *, biased: bool = True, transposed: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of GPT-2's layout, with biases or without."""
    described = Description(
        model.layers, model.heads, model.width, _positions(model), model.vocab_size, bias=biased
    )
    whole = resolve(Settings(model=gpt2_names.model_settings(described))).model
    shapes = transformer.init_shapes(whole)
    hollow = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in shapes.items()}
    theirs = gpt2_names.to_gpt2(hollow, model.vocab_size, transposed=transposed)
    return {name: array.shape for name, array in theirs.items()}


def _positions(model: ModelConfig) -> int:
    return model.longest_row() or model.seq_len


def _description(path: Path, config: Mapping[str, Any]) -> Description:
    """Of a config.json of the hub. Raises ConvertError."""
    if config.get("model_type") != "gpt2":
        raise ConvertError(f"{path}: model_type={config.get('model_type')!r} is no gpt2")
    for name, wanted in _REFUSED.items():
        if (value := config.get(name, wanted)) != wanted:
            raise ConvertError(f"{path}: {name}={value} has no counterpart here, only {wanted} has")
    activation = config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ConvertError(
            f"{path}: activation_function={activation!r} has no counterpart here; "
            f"{', '.join(_ACTIVATIONS)} have"
        )
    sizes = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    layers, heads, width, positions, vocab_size = (_count(path, config, name) for name in sizes)
    if config.get("n_inner") not in (None, 4 * width):
        raise ConvertError(
            f"{path}: n_inner={config['n_inner']} is not 4 · n_embd, as MLPs are here"
        )
    return Description(
        layers, heads, width, positions, vocab_size,
        activation=_ACTIVATIONS[activation],
        eps=float(config.get("layer_norm_epsilon", 1e-5)),
        embedding_dropout=float(config.get("embd_pdrop", 0.1)),
        branch_dropout=float(config.get("resid_pdrop", 0.1)),
        attention_dropout=float(config.get("attn_pdrop", 0.1)),
    )  # fmt: skip


def _config_json(described: Description, tokenizer: Path) -> dict[str, Any]:
    """What transformers wants to know of a model that was made here."""
    ids = {}
    if tokenizer.is_file():
        for bos in read_tokenizer(tokenizer, bos_token=None).start:  # one, or none
            ids = {"bos_token_id": bos, "eos_token_id": bos}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": described.layers,
        "n_head": described.heads,
        "n_embd": described.width,
        "n_positions": described.positions,
        "vocab_size": described.vocab_size,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[described.activation],
        "layer_norm_epsilon": described.eps,
        "embd_pdrop": described.embedding_dropout,
        "resid_pdrop": described.branch_dropout,
        "attn_pdrop": described.attention_dropout,
        **ids,
    }


def _check(run_dir: Path, config: Config) -> Description:
    """What GPT-2 a run's model is. Raises ConvertError where it is none."""
    model = config.model
    if model.loops != 1:
        raise ConvertError(
            f"{run_dir} has model.loops={model.loops}, and GPT-2 has no loops; "
            "a model of one can be converted"
        )
    on, parts = model.parts.on(), model.parts
    described = Description(
        model.layers, model.heads, model.width, _positions(model), model.vocab_size,
        activation=model.mlp.activation,
        eps=1e-5 if model.norm.eps is None else model.norm.eps,
        bias="biases" in on,
        embedding_dropout=parts["dropout"].embedding if "dropout" in on else 0.0,
        branch_dropout=parts["dropout"].branch if "dropout" in on else 0.0,
        attention_dropout=parts["attention_dropout"].rate if "attention_dropout" in on else 0.0,
    )  # fmt: skip
    own = resolve(Settings(model=gpt2_names.model_settings(described), train=config.train)).leaves()
    for key, value in config.leaves().items():
        if not key.startswith("model.") or key.startswith(_FREE):
            continue
        off = key.startswith("model.parts.") and not key.endswith(".on")
        off = off and key.split(".")[2] not in on
        activation = key == "model.mlp.activation" and value == "relu2"
        if (value != own[key] or activation) and not off:
            there = "gelu_tanh' or 'gelu" if activation else own[key]
            raise ConvertError(
                f"{run_dir} has {key}={value!r}, where GPT-2 has {there!r}; only its own model can "
                "be converted"
            )
    if any(name.startswith("rule.") for name in transformer.weights(model)):
        raise ConvertError(
            f"{run_dir} has model.variant={model.variant!r}, which has weights of its own that "
            "GPT-2 has not; only its own model can be converted"
        )
    if "learned_positions" not in on or model.head_dim * model.heads != model.width:
        raise ConvertError(f"{run_dir} is no GPT-2: it lacks learned positions, or heads that fit")
    return described


def _plain(weights: Weights, path: Path) -> Weights:
    """Tensors without prefix, masks of older files and the head, which is the token table again."""
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    plain = {name: tensor for name, tensor in plain.items() if not _MASK.fullmatch(name)}
    head, table = plain.pop("lm_head.weight", None), plain.get("wte.weight")
    if head is not None and (table is None or not torch.equal(head, table)):
        raise ConvertError(f"{path}: lm_head.weight is not wte.weight, and here they are one table")
    return plain


def _wanted(names: Sequence[str]) -> list[str]:
    """Of a model's files those that are read; weights in one file where there is one."""
    weights = [_WEIGHTS]
    if _WEIGHTS not in names and _INDEX in names:
        weights = [_INDEX, *(name for name in names if _SHARD.fullmatch(name))]
    return [_CONFIG, *weights, *(name for name in names if name in _WORDS)]


def _read_weights(folder: Path) -> tuple[Path, Weights]:
    """The tensors of a folder, from one file or from shards, and the file that has or lists them.

    Raises ConvertError.
    """
    path = folder / _INDEX
    if (folder / _WEIGHTS).is_file() or not path.is_file():
        return folder / _WEIGHTS, _safetensors(folder / _WEIGHTS)
    shard_of = _read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ConvertError(f"{path} has no weight_map; it says which file holds which tensor")
    weights: Weights = {}
    for shard in sorted(set(map(str, shard_of.values()))):
        if not _SHARD.fullmatch(shard):
            raise ConvertError(
                f"{path}: {shard!r} is no shard's name, as model-00001-of-00002.safetensors"
            )
        here = _safetensors(folder / shard)
        if wrong := sorted({n for n, of in shard_of.items() if of == shard} ^ here.keys()):
            there = "holds" if wrong[0] in here else "does not hold"
            raise ConvertError(f"{folder / shard} {there} {wrong[0]}, against {_INDEX}; get both")
        weights |= here
    return path, weights


def _safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ConvertError(
            f"{path} is missing; save the model as {_WEIGHTS}, or as shards with {_INDEX}"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{path} is damaged ({error}); get it again") from error


def _save(tensors: Weights, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})


def _tokenizer(given: Path | None, folder: Path) -> str | None:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    here = given or (folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else None)
    if here is None and vocabulary.is_file() and merges.is_file():
        return gpt2_tokenizer.core_of(vocabulary, merges).to_str()
    return checkpoint_files.tokenizer_json(here, [folder])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path} cannot be read ({error}); it says what the model is") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{path} is no description of a model")
    return found


def _count(path: Path, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ConvertError(f"{path}: {name}={value!r} is no count from 1; correct it")
    return value
