"""How large a model is, where tokens or batch follow from it: `train.scaled_by`.

A weight that is used K times costs as K weights and is one. Which of the two says how long to train
is open, so the count is chosen, and all are logged:

    all             every weight, padding included
    unique          S = matrices + head: without embeddings, scalars and vectors
    usage_weighted  matrices of looped layers K times, others and the head once
    flop_matched    training FLOPs per token / 6, attention included: of the model without loops
                    and without attention that costs as much

Without loops the first three do not depend on K. Of a tied embedding the one matrix is the head.
Weights of single loops, as LoRA's, are used once each.

Source: nanochat (Karpathy, 2025) for S; Kaplan et al., 2020 (arXiv 2001.08361) for 6 FLOPs.
"""

from __future__ import annotations

import functools

from looped_jax.config.resolved import ModelConfig
from looped_jax.model import flops, transformer
from looped_jax.model.weight_groups import lineage

LOOPED = ("blocks.", "rule.")  # names of the weights that every loop uses


@functools.lru_cache(maxsize=256)
def count(config: ModelConfig, how: str) -> int:
    """Parameters, by one of the counts of config.settings.PARAMETER_COUNTS."""
    weights = transformer.weights(config)
    if how == "all":
        return sum(weight.size for weight in weights.values())
    if how == "flop_matched":
        return round(flops.count(config).flops / 6)
    matrices = {n: w for n, w in weights.items() if w.kind == "matrix"}
    single = [w for w in weights.values() if "low_rank" in lineage(w.group)]
    head = [w for w in weights.values() if w.kind == "head"] or [weights["embed"]]
    loops = config.loops if how == "usage_weighted" else 1
    return (
        sum(w.size * (loops if name.startswith(LOOPED) else 1) for name, w in matrices.items())
        + sum(w.size for w in single)
        + sum(w.size for w in head)
    )
