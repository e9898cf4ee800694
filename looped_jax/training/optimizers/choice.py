"""The optimizer that a configuration names, for its model, run and mesh."""

from __future__ import annotations

from collections.abc import Collection

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from looped_jax.config.registry import OPTIMIZERS
from looped_jax.config.resolved import Config
from looped_jax.config.settings import OptimConfig
from looped_jax.errors import ConfigError
from looped_jax.model import transformer
from looped_jax.model.transformer import Params
from looped_jax.model.weight_groups import lineage
from looped_jax.model.weights import Weights
from looped_jax.training.optimizers import group_rates
from looped_jax.training.optimizers.base import Optimizer, RunScale
from looped_jax.training.optimizers.schedules import learning_rate_multiplier
from looped_jax.training.train_state import TrainState


def make_optimizer(
    config: Config,
    mesh: Mesh | None = None,
    *,
    steps: int | None = None,
    multiplier: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a config's model, whose states lie on `mesh` as its weights do.

    `steps` is the length of the run, by default train.steps; `multiplier` scales all learning rates
    instead of the config's schedule. Raises ConfigError for settings that have no effect.
    """
    model, steps = config.model, steps or config.train.steps
    run = RunScale(
        width=model.width,
        steps=steps,
        multiplier=multiplier or learning_rate_multiplier(config.optim, steps),
        tokens_per_step=config.train.tokens_per_step,
    )
    return of_weights(config.optim, transformer.weights(model), run, mesh)


def of_weights(
    config: OptimConfig, weights: Weights, run: RunScale, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Clip by the global norm, then what optim.optimizer names."""
    chosen: Optimizer = OPTIMIZERS[config.optimizer]()
    if (own := config.groups.changed()) and not chosen.takes_groups:
        raise ConfigError(
            f"optim.groups.{next(iter(own))} has no effect on optim.optimizer={config.optimizer}; "
            "leave it out, or take optim.optimizer=muon"
        )
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip_norm or jnp.inf),
        chosen.transformation(config, weights, run, mesh),
    )


def learning_rates(config: OptimConfig, groups: Collection[str] = ()) -> dict[str, float]:
    """Every learning rate of the optimizer in use, by the name of its setting.

    `groups` are those of the model's weights: rates of their own are among them.
    """
    name, chosen = config.optimizer, OPTIMIZERS[config.optimizer]
    rates = {f"optim.{rate}": getattr(config, rate) for rate in chosen.rates}
    own = vars(config.optimizers[name]) if hasattr(chosen, "Settings") else {}
    rates |= group_rates.own_rates(config, groups) if chosen.takes_groups else {}
    return rates | {
        f"optim.optimizers.{name}.{key}": value
        for key, value in own.items()
        if key.endswith("learning_rate")
    }


def unused_groups(config: Config) -> list[str]:
    """A line for each group that is given settings and that no weight of the model belongs to."""
    weights = transformer.weights(config.model).values()
    there = {group for weight in weights for group in lineage(weight.group)}
    return [
        f"optim.groups.{group} is given, and no weight of this model is of that group"
        for group in config.optim.groups.changed()
        if group not in there
    ]


def evaluation_params(config: OptimConfig, state: TrainState) -> Params:
    """The weights of a train state that are scored, sampled from and studied."""
    return OPTIMIZERS[config.optimizer]().evaluation_params(state)
