"""Optimizers, of optax's pieces: by default Muon for matrices, AdamW for all other weights.

To try another, register it, here or in a file of your own: it is then a choice of
`optim.optimizer`, with settings of its own under `optim.optimizers`.
"""

from looped_jax.training.optimizers.adamw import AdamW, AdamWSettings
from looped_jax.training.optimizers.base import Optimizer, RunScale
from looped_jax.training.optimizers.choice import (
    evaluation_params,
    learning_rates,
    make_optimizer,
    of_weights,
    unused_groups,
)
from looped_jax.training.optimizers.muon import Muon, MuonSettings
from looped_jax.training.optimizers.newton_schulz import orthogonalize
from looped_jax.training.optimizers.orthogonal_momentum import scale_by_muon
from looped_jax.training.optimizers.schedules import (
    decay_multiplier,
    learning_rate_multiplier,
    muon_momentum,
    restarted,
    same_until,
)

__all__ = [
    "AdamW", "AdamWSettings", "Muon", "MuonSettings", "Optimizer", "RunScale",
    "decay_multiplier", "evaluation_params",
    "learning_rate_multiplier", "learning_rates", "make_optimizer", "muon_momentum", "of_weights",
    "orthogonalize", "restarted", "same_until", "scale_by_muon",
    "unused_groups",
]  # fmt: skip
