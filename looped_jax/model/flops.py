"""What a model costs: parameters, and floating-point operations per token that count the loops.

The reference's figure ignores K and windows, which at L = 6, K = 12 reports a third of the work;
it is kept beside ours so that runs can be compared with its logs.
"""

from __future__ import annotations

from dataclasses import dataclass

from looped_jax.config import ModelConfig
from looped_jax.model import transformer


@dataclass(frozen=True)
class Cost:
    """Counts of one model. FLOPs are per token of a training step: forward 1/3, backward 2/3.

    parameters: all weights, padding included; looped: those in the blocks, used K times
    flops: true training FLOPs per token; reference_flops: as the reference counts, K ignored
    """

    parameters: int
    looped: int
    flops: float
    reference_flops: float


def count(config: ModelConfig) -> Cost:
    """Parameters and training FLOPs per token of a resolved config.

    6 FLOPs per weight use, 12 · H · Dh per visible key and layer for attention (not halved for
    causality, the field's convention); recomputation for rematerialisation is not counted.
    """
    assert config.width
    width, table = config.width, config.padded_vocab * config.width
    weights = transformer.weights(config)
    looped = sum(w.size for name, w in weights.items() if name.startswith("blocks."))
    keys = sum(min(w or config.seq_len, config.seq_len) for w in config.windows())
    loop = 6 * looped + 12 * width * keys
    return Cost(
        parameters=sum(w.size for w in weights.values()),
        looped=looped,
        flops=6 * table * len(config.scored_loops()) + config.loops * loop,
        reference_flops=6 * table + 6 * looped + 12 * width * config.seq_len * config.layers,
    )
