"""Muon for matrices, AdamW for all other weights: the default.

Recipe of the Fully Looped Transformer (arXiv 2605.18797), which follows nanochat; with the settings
below that of nanochat in 2026, see docs/optimizer.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import optax
from jax.sharding import Mesh

from looped_jax.config.options import at_least, one_of, setting, share
from looped_jax.config.registry import OPTIMIZERS
from looped_jax.config.settings import OptimConfig
from looped_jax.model.weights import Weights
from looped_jax.training.optimizers import adamw, group_rates
from looped_jax.training.optimizers.base import Optimizer, RunScale
from looped_jax.training.optimizers.decay import add_decay
from looped_jax.training.optimizers.orthogonal_momentum import scale_by_muon
from looped_jax.training.optimizers.schedules import decay_multiplier, muon_momentum

# Labels as in the first checkpoints: the names of the optimizer's states on disk hold these.
LABELS = {"matrix": "blocks", "table": "embed"}
DECAYS = ("constant", "linear", "cosine")
ORTHOGONALISATIONS = ("newton_schulz", "polar_express")


@dataclass(frozen=True)
class MuonSettings:
    """Of Muon beyond momentum and Newton–Schulz; docs/optimizer.md has the formulas."""

    orthogonalisation: str = one_of(
        ORTHOGONALISATIONS, "newton_schulz", "in optim.newton_schulz_steps iterations"
    )
    safety: float = at_least(1.0, 1.02, "Polar Express, that the norm is multiplied with before")
    equal_rows: bool = setting(False, "whether rows have one norm before orthogonalisation")
    full_norm: bool = setting(False, "whether updates have the norm of orthogonal ones after it")
    normuon: bool = setting(False, "whether neurons have updates of like sizes")
    beta2: float = share(0.95, "NorMuon, decay of the mean square")
    weight_decay: float = at_least(0.0, 0.0, "decoupled, times the learning rate of each matrix")
    cautious: bool = setting(False, "whether weights decay only where the update agrees")
    decay_schedule: str = one_of(DECAYS, "constant", "of the decay; the others end at 0")
    momentum_final: float | None = at_least(
        0.0, None, "momentum at the end, linear while the rates fall; by default it stays", high=1.0
    )


@OPTIMIZERS.register("muon")
class Muon(Optimizer):
    """Muon for the group "matrix" and AdamW for the others."""

    Settings = MuonSettings
    rates = ("matrix_learning_rate", *adamw.RATES.values())
    takes_groups = True

    def transformation(self, config, weights, run, mesh=None):
        groups = {}
        for group, kind in {w.group: w.kind for w in weights.values()}.items():
            if kind == "matrix":
                own = {name: w for name, w in weights.items() if w.group == group}
                update = _muon(config, group, own, run, mesh)
            else:
                rate = getattr(config, adamw.RATES[kind])
                update = adamw.adamw(group_rates.of_group(config, group, run, learning_rate=rate))
            groups[LABELS.get(group, group)] = update
        labels = {name: LABELS.get(w.group, w.group) for name, w in weights.items()}
        return optax.partition(groups, labels)


def _muon(
    config: OptimConfig, group: str, weights: Weights, run: RunScale, mesh: Mesh | None
) -> optax.GradientTransformation:
    """For one group of matrices. Raises ConfigError for settings of AdamW alone."""
    own = config.optimizers["muon"]
    unused = ("beta1", "eps") if own.normuon else ("beta1", "beta2", "eps")
    group_rates.refuse(
        config, group, unused, f"Muon updates {group}: leave it out, or take optim.optimizer=adamw"
    )
    rates = group_rates.of_group(
        config,
        group,
        run,
        learning_rate=config.matrix_learning_rate,
        beta2=own.beta2,
        weight_decay=own.weight_decay,
        width_scaling=False,
    )
    momentum = muon_momentum(config, run.steps)
    parts = [scale_by_muon(config, weights, mesh, momentum=momentum, beta2=rates.beta2)]
    if rates.weight_decay:
        shape = decay_multiplier(own.decay_schedule, run.steps)
        decay = add_decay(lambda step: rates.weight_decay * shape(step), cautious=own.cautious)
        parts.append(decay)
    return optax.chain(*parts, optax.scale_by_learning_rate(rates.learning_rate))
