"""How a run takes up what another has left: longer than it was meant to be, or as a new one."""

from __future__ import annotations

import dataclasses

from looped_jax.config.resolved import Config, TrainConfig
from looped_jax.errors import CheckpointError, ConfigError
from looped_jax.training import checkpoint, optimizers
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.train_state import TrainState


def check_extends(config: Config, before: int, done: int) -> None:
    """Raise CheckpointError unless a run of `before` steps, `done` taken, may have train.steps.

    It may while its learning rates, momentum and decay so far are those that a run of that length
    would have had: before the warm-down began, where there is no warm-up by share.
    """
    steps, run = config.train.steps, config.train.run_dir
    if done > steps:
        raise CheckpointError(
            f"train.steps={steps}: {run} has taken {done} steps already; give at least as many, or "
            "another train.run_dir"
        )
    sampling = config.train.loop_sampling
    if steps != before and {sampling.curriculum, sampling.backward_curriculum} != {"none"}:
        raise CheckpointError(
            f"train.steps={steps}: {run} was to end at step {before}, and loops that grow by "
            f"train.loop_sampling would have grown otherwise; give train.steps={before}, or start "
            f"a new run with its weights: --config.train.init_from={run}"
        )
    if not optimizers.same_until(config.optim, before, steps, done):
        raise CheckpointError(
            f"train.steps={steps}: {run} was to end at step {before}, and its learning rates up to "
            f"step {done} would have been others; give train.steps={before}, or start a new run "
            f"with its weights: --config.train.init_from={run}"
        )


def initialized(train: TrainConfig, fresh: TrainState, abstract: TrainState) -> TrainState:
    """A fresh state with the weights, and if asked the optimizer's state, of train.init_from.

    `abstract` says how the state is laid out. Raises ConfigError or CheckpointError.
    """
    run, _, step = (train.init_from or "").partition("@")
    if step and not step.isdigit():
        raise ConfigError(
            f"train.init_from={train.init_from}: {step!r} is no step; give RUN or RUN@STEP"
        )
    found, params = checkpoint.load_params(run, abstract.params, step=int(step) if step else None)
    if not train.init_optimizer:
        return dataclasses.replace(fresh, params=params)
    with Checkpoints(run, read_only=True) as checkpoints:
        state = checkpoints.restore(found, abstract)
    return dataclasses.replace(
        state, optimizer=optimizers.restarted(state.optimizer), step=fresh.step
    )
