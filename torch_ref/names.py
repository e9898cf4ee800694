"""The reference's parameter names and shapes, and ours; pure NumPy, needs no torch.

The reference stores linear weights as (outputs, inputs), we as (inputs, outputs): all but the
embedding are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_EMBED, _HEAD = "transformer.wte.weight", "lm_head.weight"
_BLOCK = {
    "attn.c_q": "attention.query",
    "attn.c_k": "attention.key",
    "attn.c_v": "attention.value",
    "attn.c_kv_down": "attention.latent",
    "attn.c_k_up": "attention.key",
    "attn.c_v_up": "attention.value",
    "attn.c_proj": "attention.out",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


def from_reference(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our flat parameters from the reference's. Raises KeyError for a name that it never uses."""
    ours = {}
    for name, weight in weights.items():
        if name == _EMBED:
            ours["embed"] = weight
        elif name == _HEAD:
            ours["head"] = weight.T
        else:
            prefix, group, layer, rest = name.split(".", 3)
            if (prefix, group) != ("transformer", "h") or not rest.endswith(".weight"):
                raise KeyError(name)
            ours[f"blocks.{int(layer)}.{_BLOCK[rest.removesuffix('.weight')]}"] = weight.T
    return ours


def to_reference(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The reference's parameters from ours; the inverse of from_reference."""
    latent = any(name.endswith("attention.latent") for name in params)
    kinds = {ours: theirs for theirs, ours in _BLOCK.items() if latent or "_up" not in theirs}
    theirs = {}
    for name, weight in params.items():
        if name == "embed":
            theirs[_EMBED] = weight
        elif name == "head":
            theirs[_HEAD] = weight.T
        else:
            _, layer, rest = name.split(".", 2)
            theirs[f"transformer.h.{layer}.{kinds[rest]}.weight"] = weight.T
    return theirs
