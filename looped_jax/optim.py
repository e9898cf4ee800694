"""The optimizer: Muon for matrices in the blocks, AdamW for embedding and head, as optax parts.

Recipe of the Fully Looped Transformer (arXiv 2605.18797), which follows nanochat. Muon: Jordan et
al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from looped_jax.config import OptimConfig

Array = jax.Array
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # odd quintic that pushes singular values towards 1


def learning_rate_multiplier(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, plateau, linear warm-down, as shares of `steps`; takes the 0-based step."""
    up, down = round(config.warmup_ratio * steps), round(config.warmdown_ratio * steps)

    def multiplier(step: Array) -> Array:
        rising = (step + 1) / max(up, 1)
        left = (steps - step) / max(down, 1)
        falling = left + (1 - left) * config.final_lr_fraction
        return jnp.where(step < up, rising, jnp.where(step <= steps - down, 1.0, falling))

    return multiplier


def muon_momentum(config: OptimConfig) -> optax.Schedule:
    """Momentum, linear from momentum_start to momentum_end over the warm-up steps."""
    return optax.linear_schedule(
        config.momentum_start, config.momentum_end, config.momentum_warmup_steps
    )


def orthogonalize(matrices: Array, steps: int, dtype: str) -> Array:
    """Nearest semi-orthogonal matrices, roughly, of [N, short, long]; Newton–Schulz in `dtype`.

    Singular values end in about 0.7 to 1.2, not at 1: enough for the update's direction.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.astype(dtype)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.astype(matrices.dtype)


class MuonState(NamedTuple):
    """step: [] steps taken; momentum: a running mean of gradients, shaped like the parameters."""

    step: Array
    momentum: optax.Updates


def scale_by_muon(config: OptimConfig) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, scaled by √max(1, outputs / inputs).

    For (inputs, outputs) matrices. Matrices of one shape, up to transposition, are orthogonalised
    in one batch: six layers of attention and MLP take two calls, not thirty-six.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state: MuonState, params=None):
        del params
        mu = muon_momentum(config)(state.step)
        momentum = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, grads)
        ahead = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, momentum, grads)
        leaves, structure = jax.tree.flatten(ahead)
        with jax.named_scope("newton_schulz"):
            updates = _orthogonalize_by_shape(leaves, config)
        return jax.tree.unflatten(structure, updates), MuonState(state.step + 1, momentum)

    return optax.GradientTransformation(init, update)


def _orthogonalize_by_shape(matrices: list[Array], config: OptimConfig) -> list[Array]:
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[min(matrix.shape), max(matrix.shape)].append(index)
    updates = list(matrices)
    for indices in alike.values():
        wide = [m if m.shape[0] <= m.shape[1] else m.T for m in (matrices[i] for i in indices)]
        batch = orthogonalize(
            jnp.stack(wide), config.newton_schulz_steps, config.newton_schulz_dtype
        )
        for index, result in zip(indices, batch, strict=True):
            inputs, outputs = matrices[index].shape
            result = result if inputs <= outputs else result.T
            updates[index] = result * max(1, outputs / inputs) ** 0.5
    return updates


def make_optimizer(config: OptimConfig, *, steps: int, width: int) -> optax.GradientTransformation:
    """Clip by the global norm, then Muon for `blocks.*` and AdamW for `embed` and `head`.

    For the flat parameter dict of model/transformer.py; `steps` is the length of the run.
    """
    multiplier = learning_rate_multiplier(config, steps)
    adam_scale = (width / 768) ** -0.5

    def scheduled(peak: float) -> optax.Schedule:
        return lambda step: peak * multiplier(step)

    def adamw(peak: float) -> optax.GradientTransformation:
        return optax.adamw(
            scheduled(peak * adam_scale),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    groups = {
        "blocks": optax.chain(
            scale_by_muon(config),
            optax.scale_by_learning_rate(scheduled(config.matrix_learning_rate)),
        ),
        "embed": adamw(config.embedding_learning_rate),
        "head": adamw(config.head_learning_rate),
    }
    clip = optax.clip_by_global_norm(config.grad_clip_norm or jnp.inf)
    return optax.chain(clip, optax.partition(groups, _group_of_each))


def _group_of_each(params: optax.Params) -> dict[str, str]:
    return {name: name.split(".")[0] for name in params}
