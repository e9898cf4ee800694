"""What a looped transformer is made of, and how the reference names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

VARIANTS = ("FLT", "FLT_res", "LT_ia", "LT_i", "LT")
ATTENTIONS = ("full", "mla")
LOSSES = ("END", "FEW", "STEP")

# Our field -> the reference's field, as in `model_config` of its meta_*.json files.
REFERENCE_NAMES = {
    "variant": "model_type",
    "layers": "n_layer",
    "loops": "K",
    "width": "n_embd",
    "heads": "n_head",
    "kv_heads": "n_kv_head",
    "attention": "attn_type",
    "latent_rank": "kv_lora_rank",
    "window_pattern": "window_pattern",
    "seq_len": "sequence_len",
    "vocab_size": "vocab_size",
    "loss": "loss_type",
}
# The reference omits these from a checkpoint's description when they hold their defaults.
OPTIONAL = frozenset({"attention", "latent_rank", "window_pattern", "loss"})
# Settings of the JAX side's model that have one value in the reference: their defaults.
FIXED = ("soft_cap", "head_width", "norm", "mlp", "rope", "qk", "short_window", "long_window")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and loop rule of one model; raises ValueError naming the field that cannot be.

    `loops` is the trained number of loops, `seq_len` the trained context in tokens (a short
    window is a quarter of it), `latent_rank` counts under attention="mla" only.
    """

    variant: str
    layers: int
    loops: int
    width: int
    heads: int
    kv_heads: int
    seq_len: int
    vocab_size: int
    attention: str = "full"
    latent_rank: int = 128
    window_pattern: str = "L"
    loss: str = "END"

    def __post_init__(self) -> None:
        for field, choices in (
            ("variant", VARIANTS),
            ("attention", ATTENTIONS),
            ("loss", LOSSES),
        ):
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field}={value!r} is unknown; choose one of {choices}")
        for field, value in asdict(self).items():
            if not isinstance(value, str) and (type(value) is not int or value < 1):
                raise ValueError(f"{field}={value!r} is not a count; give a whole number from 1")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width={self.width} does not split into heads={self.heads} of an even width, "
                f"which RoPE needs; make it a multiple of {2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}; choose one of "
                f"{[n for n in range(1, self.heads + 1) if self.heads % n == 0]}"
            )
        if self.attention == "mla" and self.kv_heads != self.heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} means nothing under attention='mla', where every head "
                f"has its own keys; set kv_heads={self.heads}"
            )
        if not self.window_pattern or set(self.window_pattern) - {"L", "S"}:
            raise ValueError(
                f"window_pattern={self.window_pattern!r} is not a string of L (full context) "
                "and S (short window); for example 'SSL'"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and of the head: the vocabulary up to a multiple of 64."""
        return -(-self.vocab_size // 64) * 64

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Keys each layer sees, itself included; None is all of them. The last layer sees all."""
        short = max(self.seq_len // 4, 1)
        tiled = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.layers - 1)]
        return (*(short if kind == "S" else None for kind in tiled), None)

    @classmethod
    def from_reference(cls, meta: Mapping[str, Any]) -> ModelConfig:
        """Read the reference's description: a whole meta_*.json, or its `model_config` alone.

        Raises ValueError on a missing field, and on an unknown one, since it may change the model.
        """
        given = meta.get("model_config", meta)
        ours = {theirs: field for field, theirs in REFERENCE_NAMES.items()}
        if unknown := sorted(set(given) - set(ours)):
            raise ValueError(f"model_config has unknown fields {unknown}; known are {list(ours)}")
        needed = {theirs for theirs, field in ours.items() if field not in OPTIONAL}
        if missing := sorted(needed - set(given)):
            raise ValueError(f"model_config lacks {missing}; add them to the checkpoint's meta")
        return cls(**{ours[theirs]: value for theirs, value in given.items()})

    def to_reference(self) -> dict[str, Any]:
        """The same model in the reference's field names, ready for `model_config`."""
        return {REFERENCE_NAMES[field]: value for field, value in asdict(self).items()}
