"""Which loops are scored, what they cost, and bits per byte.

B batch, T time, D width, V vocabulary, K loops, S scored loops.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_ref.model import LoopedTransformer


def scored_loops(loss: str, loops: int) -> range:
    """Zero-based loops whose logits are scored: END the last, FEW from 2K//3 on, STEP every one."""
    return range({"END": loops - 1, "FEW": 2 * loops // 3, "STEP": 0}[loss], loops)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats per token: logits [..., V], targets [...]; 0 where target < 0."""
    targets = targets.long()
    ignored = targets.masked_fill(targets < 0, -1).flatten()
    nats = F.cross_entropy(logits.flatten(0, -2), ignored, ignore_index=-1, reduction="none")
    return nats.view(targets.shape)


def mean_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats over the targets that count; NaN, as any mean of nothing, when none does."""
    return token_losses(logits, targets).sum() / (targets >= 0).sum()


class Scores(NamedTuple):
    """One batch scored: the number to differentiate and the numbers to watch."""

    objective: Tensor  # [] mean of `losses`
    losses: Tensor  # [S] mean token loss of each scored loop; the last one is what is reported
    norms: Tensor  # [K] see LoopStates


def score(
    model: LoopedTransformer, tokens: Tensor, targets: Tensor, loops: int | None = None
) -> Scores:
    """Score a batch by the model's own `loss` rule; tokens and targets [B, T], target < 0 ignored.

    Where the model recomputes its loops, the logits are recomputed too: at a real vocabulary
    one loop's logits outweigh everything else.
    """
    states = model(tokens, loops)

    def loss_of(h: Tensor) -> Tensor:
        return mean_token_loss(model.head(h), targets)

    losses = torch.stack(
        [
            checkpoint(loss_of, states.hidden[loop], use_reentrant=False)
            if model.recompute_loops
            else loss_of(states.hidden[loop])
            for loop in scored_loops(model.config.loss, len(states.hidden))
        ]
    )
    return Scores(losses.mean(), losses, states.norms)


def nats_and_bytes(nats: Tensor, targets: Tensor, byte_lengths: Tensor) -> tuple[float, int]:
    """Sums that bits per byte is the ratio of; add them over batches before dividing.

    nats, targets [B, T]; byte_lengths [V] is each token's raw bytes, 0 for special tokens.
    A target that is ignored or has no bytes counts in neither sum.
    """
    lengths = byte_lengths[targets.clamp(min=0).long()].masked_fill(targets < 0, 0)
    return nats.double()[lengths > 0].sum().item(), int(lengths.sum().item())


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Bits needed per byte of text, from the two sums; raises ValueError when no byte was seen."""
    if n_bytes < 1:
        raise ValueError(f"n_bytes={n_bytes}: no target had bytes; score text, not special tokens")
    return nats / (math.log(2) * n_bytes)
