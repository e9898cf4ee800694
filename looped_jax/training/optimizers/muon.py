"""Muon for matrices, AdamW for all other weights: the default.

Recipe of the Fully Looped Transformer (arXiv 2605.18797), which follows nanochat. Muon: Jordan et
al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from looped_jax.config.registry import OPTIMIZERS
from looped_jax.config.settings import OptimConfig
from looped_jax.model.weights import Weights
from looped_jax.runtime import sharding
from looped_jax.training.optimizers import adamw, group_rates
from looped_jax.training.optimizers.base import Optimizer
from looped_jax.training.optimizers.newton_schulz import orthogonalize

Array = jax.Array
# Labels as in the first checkpoints: the names of the optimizer's states on disk hold these.
LABELS = {"matrix": "blocks", "table": "embed"}


@OPTIMIZERS.register("muon")
class Muon(Optimizer):
    """Muon for the group "matrix" and AdamW for the others."""

    rates = ("matrix_learning_rate", *adamw.RATES.values())
    takes_groups = True

    def transformation(self, config, weights, run, mesh=None):
        kinds = {weight.group: weight.kind for weight in weights.values()}
        groups = {}
        for group, kind in kinds.items():
            if kind == "matrix":
                group_rates.refuse(
                    config, group, ("beta1", "beta2", "eps", "weight_decay"),
                    f"Muon updates {group}; leave it out, or take optim.optimizer=adamw",
                )  # fmt: skip
                rates = group_rates.of_group(
                    config, group, run, learning_rate=config.matrix_learning_rate,
                    width_scaling=False,
                )  # fmt: skip
                mine = {name: w for name, w in weights.items() if w.group == group}
                update = optax.chain(
                    scale_by_muon(config, mine, mesh),
                    optax.scale_by_learning_rate(rates.learning_rate),
                )
            else:
                rate = getattr(config, adamw.RATES[kind])
                update = adamw.adamw(group_rates.of_group(config, group, run, learning_rate=rate))
            groups[LABELS.get(group, group)] = update
        labels = {name: LABELS.get(w.group, w.group) for name, w in weights.items()}
        return optax.partition(groups, labels)


def muon_momentum(config: OptimConfig) -> optax.Schedule:
    """Momentum, linear from momentum_start to momentum_end over the warm-up steps."""
    return optax.linear_schedule(
        config.momentum_start, config.momentum_end, config.momentum_warmup_steps
    )


class MuonState(NamedTuple):
    """step: [] steps taken; momentum: a running mean of gradients, shaped like the parameters."""

    step: Array
    momentum: optax.Updates


def scale_by_muon(
    config: OptimConfig, weights: Weights, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, scaled by √max(1, outputs / inputs).

    For a flat dict of (inputs, outputs) matrices that `weights` describe. Those of one shape, up to
    transposition, are orthogonalised in one batch, of which the devices of the mesh take shares:
    six layers of attention and MLP take two calls, not thirty-six.
    """

    specs = sharding.specs(weights)

    def init(params: optax.Params) -> MuonState:
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state: MuonState, params=None):
        del params
        mu = muon_momentum(config)(state.step)
        momentum = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, grads)
        ahead = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, momentum, grads)
        leaves, structure = jax.tree_util.tree_flatten_with_path(ahead)
        matrices = {path[-1].key: leaf for path, leaf in leaves}
        with jax.named_scope("newton_schulz"):
            updates = _orthogonalize_by_shape(matrices, config, specs, mesh)
        updates = jax.tree.unflatten(structure, [updates[name] for name in matrices])
        return updates, MuonState(state.step + 1, momentum)

    return optax.GradientTransformation(init, update)


def _orthogonalize_by_shape(
    matrices: dict[str, Array], config: OptimConfig, specs: dict[str, P], mesh: Mesh | None
) -> dict[str, Array]:
    def turned(name: str) -> bool:
        """Short side first; of a square matrix the side that `fsdp` cuts, so that batches grow."""
        inputs, outputs = matrices[name].shape
        return inputs > outputs or (inputs == outputs and specs[name][0] != "fsdp")

    alike: dict[tuple, list[str]] = defaultdict(list)
    for name, matrix in matrices.items():
        shape, spec = matrix.shape, tuple(specs[name])
        alike[(shape[::-1], spec[::-1]) if turned(name) else (shape, spec)].append(name)
    updates = {}
    for (_, spec), names in alike.items():
        batch = jnp.stack([matrices[n].T if turned(n) else matrices[n] for n in names])
        results = sharding.map_over_shards(
            functools.partial(orthogonalize, steps=config.newton_schulz_steps),
            batch.astype(config.newton_schulz_dtype),  # what travels between devices is small too
            spec=P(*spec),
            mesh=mesh,
        )
        for name, result in zip(names, results.astype(batch.dtype), strict=True):
            inputs, outputs = matrices[name].shape
            scale = max(1, outputs / inputs) ** 0.5
            updates[name] = scale * (result.T if turned(name) else result)
    return updates
