"""Optimizers, of optax's pieces: by default Muon for matrices, AdamW for all other weights.

To try another, register it, here or in a file of your own: it is then a choice of
`optim.optimizer`, with settings of its own under `optim.optimizers`.

Recipe of the Fully Looped Transformer (arXiv 2605.18797), which follows nanochat. Muon: Jordan et
al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

import abc
import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from looped_jax.config.options import setting
from looped_jax.config.registry import OPTIMIZERS
from looped_jax.config.resolved import Config
from looped_jax.config.settings import OptimConfig
from looped_jax.model import transformer
from looped_jax.model.transformer import Params
from looped_jax.model.weights import Weights
from looped_jax.runtime import sharding
from looped_jax.training.train_state import TrainState

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


def same_until(config: OptimConfig, steps: int, other: int, done: int) -> bool:
    """Whether runs of `steps` and of `other` steps have had the same learning rates for `done`."""
    first, second = (learning_rate_multiplier(config, n) for n in (steps, other))
    so_far = jnp.arange(done)
    return bool(jnp.array_equal(first(so_far), second(so_far)))


def restarted(state: Any) -> Any:
    """An optimizer's state whose schedules begin anew and whose averages go on."""

    def anew(part: Any) -> Any:
        fresh = isinstance(part, optax.ScaleByScheduleState)
        return part._replace(count=jnp.zeros_like(part.count)) if fresh else part

    return jax.tree.map(anew, state, is_leaf=lambda p: isinstance(p, optax.ScaleByScheduleState))


def muon_momentum(config: OptimConfig) -> optax.Schedule:
    """Momentum, linear from momentum_start to momentum_end over the warm-up steps."""
    return optax.linear_schedule(
        config.momentum_start, config.momentum_end, config.momentum_warmup_steps
    )


def orthogonalize(matrices: Array, steps: int) -> Array:
    """Nearest semi-orthogonal matrices, roughly, of [N, short, long]; Newton–Schulz in their type.

    Singular values end in about 0.7 to 1.2, not at 1: enough for the update's direction.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / (jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


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


ADAMW_RATES = ("embedding_learning_rate", "head_learning_rate", "vector_learning_rate")


class Optimizer(abc.ABC):
    """How weights are updated; see model/weights.py for what each weight says of itself.

    rates: the learning rates of OptimConfig that it uses, beside those of its own settings
    """

    rates: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def transformation(
        self,
        config: OptimConfig,
        weights: Weights,
        *,
        width: int,
        multiplier: optax.Schedule,
        mesh: Mesh | None = None,
    ) -> optax.GradientTransformation:
        """For a flat dict of parameters that `weights` describe, in a model of width D.

        Gradients come clipped. `multiplier` scales every learning rate. State that has a weight's
        name lies on `mesh` as that weight does, along each dimension of the weight's size.
        """

    def evaluation_params(self, state: TrainState) -> Params:
        """The weights that training validates, samples from and chooses the best checkpoint by.

        An optimizer that averages weights, or trains others than it means, gives them here. What
        is saved, and what `load` opens, are the weights that are trained.
        """
        return state.params


@OPTIMIZERS.register("muon")
class Muon(Optimizer):
    """Muon for the group "matrix" and AdamW for the others."""

    rates = ("matrix_learning_rate", *ADAMW_RATES)

    def transformation(self, config, weights, *, width, multiplier, mesh=None):
        adam_scale = (width / 768) ** -0.5
        # Named as in the first checkpoints: the names of the optimizer's states on disk hold these.
        groups = {
            "blocks": optax.chain(
                scale_by_muon(config, weights, mesh),
                optax.scale_by_learning_rate(_scheduled(config.matrix_learning_rate, multiplier)),
            ),
            "embed": _adamw(config, config.embedding_learning_rate * adam_scale, multiplier),
            "head": _adamw(config, config.head_learning_rate * adam_scale, multiplier),
        }
        labels = {"matrix": "blocks", "table": "embed", "head": "head", "vector": "vector"}
        of_each = {name: labels[weight.group] for name, weight in weights.items()}
        if "vector" in of_each.values():
            rate = config.vector_learning_rate * adam_scale
            groups["vector"] = _adamw(config, rate, multiplier)
        return optax.partition(groups, of_each)


@dataclass(frozen=True)
class AdamWSettings:
    """Of AdamW for all weights."""

    matrix_learning_rate: float = setting(0.003, "of the matrices, times (D / 768) ** -0.5")


@OPTIMIZERS.register("adamw")
class AdamW(Optimizer):
    """AdamW for every weight, the groups at their own rates."""

    Settings = AdamWSettings
    rates = ADAMW_RATES

    def transformation(self, config, weights, *, width, multiplier, mesh=None):
        rates = {
            "matrix": config.optimizers["adamw"].matrix_learning_rate,
            "table": config.embedding_learning_rate,
            "head": config.head_learning_rate,
            "vector": config.vector_learning_rate,
        }
        of_each = {name: weight.group for name, weight in weights.items()}
        scale = (width / 768) ** -0.5
        groups = {
            group: _adamw(config, rates[group] * scale, multiplier)
            for group in sorted(set(of_each.values()))
        }
        return optax.partition(groups, of_each)


def _scheduled(peak: float, multiplier: optax.Schedule) -> optax.Schedule:
    return lambda step: peak * multiplier(step)


def _adamw(
    config: OptimConfig, peak: float, multiplier: optax.Schedule
) -> optax.GradientTransformation:
    return optax.adamw(
        _scheduled(peak, multiplier),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def make_optimizer(
    config: Config,
    mesh: Mesh | None = None,
    *,
    steps: int | None = None,
    multiplier: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a config's model, whose states lie on `mesh` as its weights do.

    `steps` is the length of the run, by default train.steps; `multiplier` scales all learning rates
    instead of the config's schedule.
    """
    model = config.model
    multiplier = multiplier or learning_rate_multiplier(config.optim, steps or config.train.steps)
    return of_weights(
        config.optim, transformer.weights(model), width=model.width, multiplier=multiplier,
        mesh=mesh,
    )  # fmt: skip


def of_weights(
    config: OptimConfig,
    weights: Weights,
    *,
    width: int,
    multiplier: optax.Schedule,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Clip by the global norm, then what optim.optimizer names."""
    chosen: Optimizer = OPTIMIZERS[config.optimizer]()
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip_norm or jnp.inf),
        chosen.transformation(config, weights, width=width, multiplier=multiplier, mesh=mesh),
    )


def learning_rates(config: OptimConfig) -> dict[str, float]:
    """Every learning rate of the optimizer in use, by the name of its setting."""
    name, chosen = config.optimizer, OPTIMIZERS[config.optimizer]
    rates = {f"optim.{rate}": getattr(config, rate) for rate in chosen.rates}
    own = vars(config.optimizers[name]) if hasattr(chosen, "Settings") else {}
    return rates | {
        f"optim.optimizers.{name}.{key}": value
        for key, value in own.items()
        if key.endswith("learning_rate")
    }


def evaluation_params(config: OptimConfig, state: TrainState) -> Params:
    """The weights of a train state that are scored, sampled from and studied."""
    return OPTIMIZERS[config.optimizer]().evaluation_params(state)
