"""The reference's golden numbers as our configs and parameters. See golden/README.md."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from looped_jax.config.resolved import ModelConfig
from torch_ref.names import from_reference

FOLDER = Path(__file__).parent / "golden"
FORWARD = sorted(p.stem for p in FOLDER.glob("*.npz") if not p.stem.startswith("train_"))
TRAINING = sorted(p.stem for p in FOLDER.glob("train_*.npz"))


@dataclass
class Case:
    model: ModelConfig
    arrays: dict[str, np.ndarray]
    hyper: dict

    def weights(self, prefix: str) -> dict[str, np.ndarray]:
        """Our parameters (or gradients) from the arrays named `prefix/<reference name>`."""
        named = {k: v for k, v in self.arrays.items() if k.startswith(f"{prefix}/")}
        return from_reference({k.split("/", 1)[1]: v for k, v in named.items()})


def load(name: str) -> Case:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    c = json.loads(str(arrays.pop("config")))
    hyper = json.loads(str(arrays.pop("hyper"))) if "hyper" in arrays else {}
    model = ModelConfig(
        variant=c["model_type"],
        layers=c["n_layer"],
        loops=c["K"],
        width=c["n_embd"],
        heads=c["n_head"],
        kv_heads=c["n_kv_head"],
        attention=c.get("attn_type", "full"),
        latent_rank=c.get("kv_lora_rank", 128),
        window_pattern=c.get("window_pattern", "L"),
        seq_len=c["sequence_len"],
        vocab_size=c["vocab_size"],
        loss=c.get("loss_type", "END"),
        dtype="float32",
    )
    return Case(model, arrays, hyper)
