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
)
from looped_jax.training.optimizers.learning_rate_schedule import (
    learning_rate_multiplier,
    restarted,
    same_until,
)
from looped_jax.training.optimizers.muon import Muon, muon_momentum, scale_by_muon
from looped_jax.training.optimizers.newton_schulz import orthogonalize

__all__ = [
    "AdamW", "AdamWSettings", "Muon", "Optimizer", "RunScale", "evaluation_params",
    "learning_rate_multiplier", "learning_rates", "make_optimizer", "muon_momentum", "of_weights",
    "orthogonalize", "restarted", "same_until", "scale_by_muon",
]  # fmt: skip
