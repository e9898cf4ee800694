"""The claim's experiment as a grid; see benchmarks/claim.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from looped_jax.config.settings import OptimConfig

RATES = ("matrix_learning_rate", "embedding_learning_rate", "head_learning_rate")


@dataclass(frozen=True)
class Setting:
    """One experiment.

    text, characters: see claim_task.ClaimSettings
    rates: further rows (rule, K, multiplier of all learning rates)
    equal_flops: also one loop for as many FLOPs as the largest loop count takes
    """

    layers: int
    width: int
    heads: int
    seq_len: int
    batch_size: int
    steps: int
    text: str
    loops: tuple[int, ...] = (1, 3, 6, 9, 12)
    rules: tuple[str, ...] = ("FLT", "FLT_res", "LT_ia", "LT_i", "LT")
    seeds: tuple[int, ...] = (1, 2, 3)
    rates: tuple[tuple[str, int, float], ...] = ()
    equal_flops: bool = False
    characters: int = 64_000
    data: str = "builtin"
    dtype: str = "float32"

    def grid(self) -> dict[str, Any]:
        """With one loop all rules are the same: it is run as FLT, and first."""
        rows: list[dict[str, Any]] = [{"settings": {"model.variant": "FLT", "model.loops": 1}}]
        for k in (k for k in self.loops if k > 1):
            rows += [{"settings": {"model.variant": r, "model.loops": k}} for r in self.rules]
        for rule, k, rate in self.rates:
            scaled = {f"optim.{name}": rate * getattr(OptimConfig(), name) for name in RATES}
            row = {"model.variant": rule, "model.loops": k, **scaled}
            rows.append({"label": f"{rule} K={k} ×{rate:g} rate", "settings": row})
        if self.equal_flops and max(self.loops) > 1:
            one = {"model.variant": "FLT", "model.loops": 1}
            rows.append({"label": "FLT K=1, equal FLOPs", "settings": one, "equal": "flops"})
        longest = f"{self.rules[0]} K={max(self.loops)}" if max(self.loops) > 1 else "FLT K=1"
        return {
            "config": "flt",
            "imports": ["benchmarks.claim_task"],
            "settings": {
                "model.layers": self.layers,
                "model.width": self.width,
                "model.heads": self.heads,
                "model.seq_len": self.seq_len,
                "model.dtype": self.dtype,
                "optim.warmdown_ratio": 0.0,
                "data.task": "claim",
                "data.tasks.claim.text": self.text,
                "data.tasks.claim.characters": self.characters,
                "data.path": self.data,
                "data.tokenizer": None,
                "data.train_shards": None,
                "data.workers": 0,
                "train.steps": self.steps,
                "train.tokens_per_step": self.batch_size * self.seq_len,
                "train.batch_size": self.batch_size,
                "train.eval_every": 0,
                "train.eval_first": False,
                "train.eval_loops": (1,),
                "train.save_every": 0,
                "train.keep": 1,
            },
            "rows": rows,
            "seeds": list(self.seeds),
            "reference": longest,
        }


PRESETS = {
    "laptop": Setting(  # what the PyTorch reference was measured at
        layers=3, width=96, heads=2, seq_len=64, batch_size=8, steps=200, text="bytes",
        rates=(("LT", 12, 0.25), ("FLT", 12, 4.0)), equal_flops=True,
    ),
    "larger": Setting(
        layers=6, width=128, heads=2, seq_len=128, batch_size=8, steps=300, text="tokens",
        loops=(1, 12), rules=("FLT", "LT_ia", "LT_i", "LT"), seeds=(1,), equal_flops=True,
    ),
    "gpu": Setting(
        layers=6, width=384, heads=3, seq_len=1024, batch_size=32, steps=2000, text="tokens",
        loops=(1, 6, 9, 12), seeds=(1, 2, 3), equal_flops=True, dtype="bfloat16",
    ),
}  # fmt: skip
