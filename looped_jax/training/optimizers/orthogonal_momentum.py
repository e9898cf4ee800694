"""Muon's update of matrices: their Nesterov momentum, orthogonalised.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from looped_jax.config.settings import OptimConfig
from looped_jax.model.weights import Weights
from looped_jax.runtime import sharding
from looped_jax.training.optimizers import matrix_norms, normuon
from looped_jax.training.optimizers.decay import shape_factor
from looped_jax.training.optimizers.newton_schulz import orthogonalize
from looped_jax.training.optimizers.polar_express import polar_express
from looped_jax.training.optimizers.schedules import muon_momentum

Array = jax.Array


class MuonState(NamedTuple):
    """step: [] steps taken; momentum: a running mean of gradients, shaped like the parameters.

    second: with NorMuon its running mean of squares, (1, outputs) or (inputs, 1) of each
    """

    step: Array
    momentum: optax.Updates
    second: optax.Updates | None = None


def scale_by_muon(
    config: OptimConfig,
    weights: Weights,
    mesh: Mesh | None = None,
    *,
    momentum: optax.Schedule | None = None,
    beta2: float | None = None,
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, scaled by √max(1, outputs / inputs).

    For a flat dict of (inputs, outputs) matrices that `weights` describe. Those of one shape, up to
    transposition, are orthogonalised in one batch, of which the devices of the mesh take shares:
    six layers of attention and MLP take two calls, not thirty-six. `momentum` and NorMuon's `beta2`
    are by default as `config` has them.
    """
    specs, own = sharding.specs(weights), config.optimizers["muon"]
    momentum_at = momentum or muon_momentum(config)
    beta2 = own.beta2 if beta2 is None else beta2

    def init(params: optax.Params) -> MuonState:
        second = jax.tree.map(normuon.start, params) if own.normuon else None
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params), second)

    def update(grads, state: MuonState, params=None):
        del params
        mu = momentum_at(state.step)
        momentum = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, grads)
        ahead = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, momentum, grads)
        matrices, restore = _by_name(ahead)
        with jax.named_scope("newton_schulz"):
            updates = _orthogonalize_by_shape(matrices, config, specs, mesh)
        second = state.second
        if own.normuon:
            with jax.named_scope("normuon"):
                updates, squares = normuon.normalised(
                    updates, _by_name(second)[0], beta2=beta2, specs=specs, mesh=mesh
                )
            second = restore(squares)
        updates = {name: shape_factor(u.shape) * u for name, u in updates.items()}
        return restore(updates), MuonState(state.step + 1, momentum, second)

    return optax.GradientTransformation(init, update)


def _by_name(tree: optax.Updates) -> tuple[dict[str, Array], Callable[[dict], optax.Updates]]:
    """The matrices of a flat dict that may hold masked ones, and the way back."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [path[-1].key for path, _ in leaves]
    found = {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}
    return found, lambda own: jax.tree.unflatten(structure, [own[name] for name in names])


def _orthogonalize_by_shape(
    matrices: dict[str, Array], config: OptimConfig, specs: dict[str, P], mesh: Mesh | None
) -> dict[str, Array]:
    own = config.optimizers["muon"]

    def turned(name: str) -> bool:
        """Short side first; of a square matrix the side that `fsdp` cuts, so that batches grow."""
        inputs, outputs = matrices[name].shape
        return inputs > outputs or (inputs == outputs and specs[name][0] != "fsdp")

    alike: dict[tuple, list[str]] = defaultdict(list)
    for name, matrix in matrices.items():
        shape, spec = matrix.shape, tuple(specs[name])
        outputs = (-2 if turned(name) else -1) if own.equal_rows else None
        key = (shape[::-1], spec[::-1]) if turned(name) else (shape, spec)
        alike[(*key, outputs)].append(name)
    updates = {}
    for (_, spec, outputs), names in alike.items():
        batch = jnp.stack([matrices[n].T if turned(n) else matrices[n] for n in names])
        results = sharding.map_over_shards(
            functools.partial(_orthogonal, config=config, outputs=outputs),
            batch.astype(config.newton_schulz_dtype),  # what travels between devices is small too
            spec=P(*spec),
            mesh=mesh,
        )
        for name, result in zip(names, results.astype(batch.dtype), strict=True):
            updates[name] = result.T if turned(name) else result
    return updates


def _orthogonal(batch: Array, *, config: OptimConfig, outputs: int | None) -> Array:
    """Of [N, short, long] whole matrices, whose rows are counted by axis `outputs`."""
    own, steps = config.optimizers["muon"], config.newton_schulz_steps
    if outputs is not None:
        batch = matrix_norms.equal_rows(batch, outputs=outputs)
    if own.orthogonalisation == "polar_express":
        batch = polar_express(batch, steps, safety=own.safety)
    else:
        batch = orthogonalize(batch, steps)
    return matrix_norms.full_norm(batch) if own.full_norm else batch
