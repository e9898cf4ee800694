"""Width, batch, rates, decay and length that follow from depth, as nanochat has them.

S is what is counted of a model (model/parameter_counts.py), D = ⌊ratio · S⌋ its tokens, B its
batch. A reference model of the same settings, 12 layers and one loop, has D_ref, and rates and
decay that were tuned at a batch of B_ref:

    B  = 2 ^ round(log2(B_ref · (D / D_ref) ^ 0.383))
    learning rates × √(B / B_ref)
    weight decay of matrices × √(B / B_ref) · D_ref / D

Source: nanochat (Karpathy, 2025), base_train.py of 2026. The exponent is of Bergsma et al., "Power
lines", 2025 (arXiv 2505.13738), whose weight decay keeps the time scale of AdamW's average.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

BATCH_EXPONENT = 0.383
HEAD_WIDTH, WIDTH_PER_LAYER, REFERENCE_LAYERS = 128, 64, 12
REFERENCE_WIDTH = 768


@dataclass(frozen=True)
class Recipe:
    """nanochat's constants at 12 layers.

    Rates of head, table and value_table are times (width / 768) ** -0.5; decay is of matrices.
    """

    tokens_per_parameter: float
    matrix: float
    head: float
    table: float
    value_table: float
    residual_scalar: float
    input_scalar: float
    weight_decay: float
    batch_tokens: int = 2**19


FEBRUARY_2026 = Recipe(
    tokens_per_parameter=10.5, matrix=0.02, head=0.004, table=0.3, value_table=0.3,
    residual_scalar=0.005, input_scalar=0.5, weight_decay=0.2,
)  # fmt: skip
JULY_2026 = dataclasses.replace(
    FEBRUARY_2026, tokens_per_parameter=12.0, head=0.008, value_table=0.15, weight_decay=0.28
)


@dataclass(frozen=True)
class Scale:
    """What a model's run has in place of the reference's.

    batch_tokens: B; rates, decay: factors of learning rates and of the decay of matrices
    """

    batch_tokens: int
    rates: float
    decay: float


def width(layers: int, *, per_layer: int = WIDTH_PER_LAYER, head_width: int = HEAD_WIDTH) -> int:
    """Channels of a model, in whole heads."""
    return math.ceil(layers * per_layer / head_width) * head_width


def tokens(tokens_per_parameter: float, parameters: float) -> int:
    """D."""
    return int(tokens_per_parameter * parameters)


def batch(tokens: int, reference_tokens: int, reference_batch: int) -> int:
    """B, a power of two."""
    wanted = reference_batch * (tokens / reference_tokens) ** BATCH_EXPONENT
    return 2 ** round(math.log2(wanted))


def scale(
    tokens: int, reference_tokens: int, reference_batch: int, batch_tokens: int | None = None
) -> Scale:
    """Of a run of D `tokens`; its batch follows from them unless `batch_tokens` is given."""
    taken = batch_tokens or batch(tokens, reference_tokens, reference_batch)
    rates = (taken / reference_batch) ** 0.5
    return Scale(taken, rates, rates * (reference_tokens / tokens))
