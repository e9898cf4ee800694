"""nanochat's parameter names, shapes and model settings, and ours; pure NumPy, needs no torch.

Of its speedrun of February 2026 (b7629ef, "seed") and of July 2026 (92d63d4, "head"), which has
smear and backout too. Linear weights are stored there as (outputs, inputs), here as (inputs,
outputs). nanochat has no loops: a checkpoint is a model of one, and runs with any number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from looped_jax.config.options import Parts
from looped_jax.config.registry import PARTS
from looped_jax.config.settings import ModelSettings
from looped_jax.config.transformer_settings import (
    InitSettings,
    QKSettings,
    RopeSettings,
    ShortWindowSettings,
)

RELEASES = ("seed", "head")
LOOPS = ("carry", "x0_first", "renorm")
_SAME = {
    "transformer.wte.weight": "embed",
    "smear_lambda": "parts.smear.scale",
    "backout_lambda": "parts.backout.scale",
}
_TRANSPOSED = {"lm_head.weight": "head", "smear_gate.weight": "parts.smear.gate"}
_OF_ALL_LAYERS = {  # [L] there, [1, L] here: one set for all loops
    "resid_lambdas": "parts.residual_scalars.residual",
    "x0_lambdas": "parts.residual_scalars.input",
}
_TABLE = ("value_embeds.{}.weight", "blocks.{}.parts.value_embedding.table")
_OF_LAYER = {
    f"transformer.h.{{}}.{theirs}.weight": f"blocks.{{}}.{ours}"
    for theirs, ours in {
        "attn.c_q": "attention.query",
        "attn.c_k": "attention.key",
        "attn.c_v": "attention.value",
        "attn.c_proj": "attention.out",
        "attn.ve_gate": "parts.value_embedding.gate",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }.items()
}


def from_nanochat(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our flat parameters from nanochat's. Raises KeyError for a name that it never uses."""
    ours = {}
    for name, weight in weights.items():
        of_layer, layer = _without_layer(name)
        if name in _SAME:
            ours[_SAME[name]] = weight
        elif name in _TRANSPOSED:
            ours[_TRANSPOSED[name]] = weight.T
        elif name in _OF_ALL_LAYERS:
            ours[_OF_ALL_LAYERS[name]] = weight[None]
        elif of_layer == _TABLE[0]:
            ours[_TABLE[1].format(layer)] = weight
        else:
            ours[_OF_LAYER[of_layer].format(layer)] = weight.T
    return ours


def to_nanochat(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """nanochat's parameters from ours, by its names; the inverse of from_nanochat.

    Raises KeyError for a name that has no counterpart there, ValueError for scalars of each loop.
    """
    same, transposed, of_all, of_layers = (
        {ours: theirs for theirs, ours in names.items()}
        for names in (_SAME, _TRANSPOSED, _OF_ALL_LAYERS, _OF_LAYER)
    )
    theirs = {}
    for name, weight in params.items():
        of_layer, layer = _without_layer(name)
        if name in same:
            theirs[same[name]] = weight
        elif name in transposed:
            theirs[transposed[name]] = weight.T
        elif name in of_all:
            if len(weight) != 1:
                raise ValueError(
                    f"{name} has {len(weight)} sets, one for each loop; nanochat has 1"
                )
            theirs[of_all[name]] = weight[0]
        elif of_layer == _TABLE[1]:
            theirs[_TABLE[0].format(layer)] = weight
        else:
            theirs[of_layers[of_layer].format(layer)] = weight.T
    return theirs


def release_of(weights: Mapping[str, Any]) -> str:
    """Which of RELEASES has weights of these names."""
    return "head" if "smear_gate.weight" in weights else "seed"


def model_settings(
    config: Mapping[str, Any], release: str, *, loops: int = 1, mode: str = "carry", **changes: Any
) -> ModelSettings:
    """Our settings of the model that nanochat's `model_config` describes, run `loops` times.

    release: one of RELEASES. mode: what passes between loops, one of LOOPS; the same for one loop.
    `changes` are further settings, as dtype.
    """
    head = release == "head"
    parts: dict[str, dict[str, Any]] = {
        "residual_scalars": {"x0": "first_visit" if mode == "x0_first" else "every_visit"},
        "value_embedding": {"layers": "alternate", "gate": True, "table_scale": 1.0},
    }
    if mode != "renorm":
        parts["carried_scale"] = {}
    if head:
        parts["residual_scalars"] |= {
            "residual_first": 1.15, "residual_last": 1.05, "input_first": 0.2, "input_last": 0.05,
        }  # fmt: skip
        parts["value_embedding"] |= {"gate_scale": 3.0, "gate_channels": 12, "gate_bound": 0.02}
        parts |= {"smear": {}, "backout": {}}
    return ModelSettings(
        **{
            "variant": "LT",
            "layers": config["n_layer"],
            "loops": loops,
            "width": config["n_embd"],
            "heads": config["n_head"],
            "kv_heads": config["n_kv_head"],
            "seq_len": config["sequence_len"],
            "vocab_size": config["vocab_size"],
            "window_pattern": config["window_pattern"],
            "long_window": config["sequence_len"] + 1,
            "short_window": ShortWindowSettings(
                share=0.25 if head else 0.5, multiple=128 if head else 1, beside_itself=True
            ),
            "rope": RopeSettings(base=100_000.0, dtype="float32") if head else RopeSettings(),
            "qk": QKSettings(scale=1.2 if head else 1.0),
            "init": InitSettings(embedding_std=0.8, up_scale=0.4) if head else InitSettings(),
            "parts": Parts(
                {name: PARTS[name].Settings(on=True, **own) for name, own in parts.items()}
            ),
        }
        | changes
    )


def _without_layer(name: str) -> tuple[str, int]:
    """A name with {} for its number of a layer, and the number; -1 without one."""
    words = name.split(".")
    numbers = [at for at, word in enumerate(words) if word.isdecimal()]
    if not numbers:
        return name, -1
    layer = int(words[numbers[0]])
    words[numbers[0]] = "{}"
    return ".".join(words), layer
