"""GPT-2's parameter names, shapes and model settings, and ours; pure NumPy, needs no torch.

As the hub's checkpoints have them, whose linear weights are (inputs, outputs) as ours are, and as
nanoGPT has them, (outputs, inputs). GPT-2 has no loops: it is a model of one, runs with any number,
and in one loop stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from looped_jax.config.options import Parts
from looped_jax.config.registry import PARTS
from looped_jax.config.settings import ModelSettings
from looped_jax.config.transformer_settings import (
    InitSettings,
    MLPSettings,
    NormSettings,
    QKSettings,
    RopeSettings,
)

Arrays = dict[str, np.ndarray]
QKV = ("query", "key", "value")  # of which c_attn is made, side by side
PREFIX = "transformer."
_OF_MODEL = {
    "wte.weight": "embed",
    "wpe.weight": "parts.learned_positions.table",
    "ln_f.weight": "norm.gain",
    "ln_f.bias": "norm.bias",
}
_OF_LAYER = {
    "ln_1.weight": "attention_norm.gain",
    "ln_1.bias": "attention_norm.bias",
    "ln_2.weight": "mlp_norm.gain",
    "ln_2.bias": "mlp_norm.bias",
    "attn.c_proj.weight": "attention.out",
    "attn.c_proj.bias": "parts.biases.of.out",
    "mlp.c_fc.weight": "mlp.up",
    "mlp.c_fc.bias": "parts.biases.of.up",
    "mlp.c_proj.weight": "mlp.down",
    "mlp.c_proj.bias": "parts.biases.of.down",
}
_ATTENTION = {  # its three parts
    "attn.c_attn.weight": "attention.{}",
    "attn.c_attn.bias": "parts.biases.of.{}",
}


@dataclass(frozen=True)
class Description:
    """What a GPT-2 is, by our words: sizes, activation, and what is dropped in training."""

    layers: int
    heads: int
    width: int
    positions: int
    vocab_size: int
    activation: str = "gelu_tanh"
    eps: float = 1e-5
    bias: bool = True
    embedding_dropout: float = 0.0
    branch_dropout: float = 0.0
    attention_dropout: float = 0.0


def from_gpt2(weights: Mapping[str, np.ndarray], *, transposed: bool = False) -> Arrays:
    """Our flat parameters from GPT-2's, named with or without `transformer.`; KeyError for others.

    The vocabulary is filled up with zeros. `transposed`: linear weights are (outputs, inputs).
    """
    ours = {}
    for full, array in weights.items():
        name = full.removeprefix(PREFIX)
        if name in _OF_MODEL:
            rows = -len(array) % 64 if name == "wte.weight" else 0
            ours[_OF_MODEL[name]] = np.pad(array, ((0, rows), (0, 0))) if rows else array
            continue
        layer, of_layer = _split(name)
        turned = array.T if transposed and array.ndim == 2 else array
        if of_layer in _ATTENTION:
            for kind, third in zip(QKV, np.split(turned, 3, axis=-1), strict=True):
                ours[f"blocks.{layer}.{_ATTENTION[of_layer].format(kind)}"] = third
        else:
            ours[f"blocks.{layer}.{_OF_LAYER[of_layer]}"] = turned
    return ours


def to_gpt2(
    params: Mapping[str, np.ndarray], vocab_size: int, *, transposed: bool = False
) -> Arrays:
    """GPT-2's parameters from ours, named with `transformer.`; the inverse of from_gpt2.

    Raises KeyError for a name that has no counterpart there.
    """
    of_model = {ours: theirs for theirs, ours in _OF_MODEL.items()}
    of_layer = {ours: theirs for theirs, ours in _OF_LAYER.items()}
    thirds = {
        ours.format(kind): (theirs, kind) for theirs, ours in _ATTENTION.items() for kind in QKV
    }
    theirs: Arrays = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in params.items():
        if name in of_model:
            array = array[:vocab_size] if name == "embed" else array
            theirs[PREFIX + of_model[name]] = array
            continue
        _, layer, own = name.split(".", 2)
        place = f"{PREFIX}h.{layer}."
        if own in thirds:
            whole, kind = thirds[own]
            parts.setdefault(place + whole, {})[kind] = array
        else:
            turned = array.T if transposed and array.ndim == 2 else array
            theirs[place + of_layer[own]] = turned
    for name, found in parts.items():
        whole_array = np.concatenate([found[kind] for kind in QKV], axis=-1)
        theirs[name] = whole_array.T if transposed and whole_array.ndim == 2 else whole_array
    return theirs


def model_settings(
    described: Description, *, loops: int = 1, dtype: str = "float32"
) -> ModelSettings:
    """Our settings of that model, run `loops` times."""
    dropped = {"embedding": described.embedding_dropout, "branch": described.branch_dropout}
    parts: dict[str, dict] = {"learned_positions": {}}
    if described.bias:
        parts["biases"] = {}
    if any(dropped.values()):
        parts["dropout"] = dropped
    if described.attention_dropout:
        parts["attention_dropout"] = {"rate": described.attention_dropout}
    return ModelSettings(
        variant="LT",
        layers=described.layers,
        loops=loops,
        width=described.width,
        heads=described.heads,
        seq_len=described.positions,
        vocab_size=described.vocab_size,
        dtype=dtype,
        embedding="tied",
        soft_cap=0.0,
        norm=NormSettings(
            kind="layer", gain=True, bias=described.bias, eps=described.eps, embedding=False
        ),
        mlp=MLPSettings(activation=described.activation),
        rope=RopeSettings(on=False),
        qk=QKSettings(norm="none"),
        init=InitSettings(
            embedding_std=0.02, in_std=0.02, out_std=0.02 / (2 * described.layers) ** 0.5
        ),
        parts=Parts({name: PARTS[name].Settings(on=True, **own) for name, own in parts.items()}),
    )


def _split(name: str) -> tuple[int, str]:
    """(3, "mlp.c_fc.weight") of "h.3.mlp.c_fc.weight". Raises KeyError."""
    words = name.split(".", 2)
    if len(words) < 3 or words[0] != "h" or not words[1].isdecimal():
        raise KeyError(name)
    return int(words[1]), words[2]
