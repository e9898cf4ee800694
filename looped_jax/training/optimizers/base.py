"""What an optimizer is, and what it is told of the run."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import jax
import optax
from jax.sharding import Mesh

from looped_jax.config.settings import OptimConfig
from looped_jax.model.transformer import Params
from looped_jax.model.weights import Weights
from looped_jax.training.train_state import TrainState

Array = jax.Array


@dataclass(frozen=True)
class RunScale:
    """The sizes of a run that rates follow from, beside their settings.

    width: D; steps: N, of the optimizer; multiplier: the schedule, which scales every learning rate
    tokens_per_step: B, or None where nothing depends on it
    """

    width: int
    steps: int
    multiplier: optax.Schedule
    tokens_per_step: int | None = None


class Optimizer(abc.ABC):
    """How weights are updated; see model/weights.py for what each weight says of itself.

    rates: the learning rates of OptimConfig that it uses, beside those of its own settings
    takes_groups: whether it heeds the settings under optim.groups
    """

    rates: ClassVar[tuple[str, ...]] = ()
    takes_groups: ClassVar[bool] = False

    @abc.abstractmethod
    def transformation(
        self, config: OptimConfig, weights: Weights, run: RunScale, mesh: Mesh | None = None
    ) -> optax.GradientTransformation:
        """For a flat dict of parameters that `weights` describe.

        Gradients come clipped. `run.multiplier` scales every learning rate. State that has a
        weight's name lies on `mesh` as that weight does, along each dimension of the weight's size.
        """

    def evaluation_params(self, state: TrainState) -> Params:
        """The weights that training validates, samples from and chooses the best checkpoint by.

        An optimizer that averages weights, or trains others than it means, gives them here. What
        is saved, and what `load` opens, are the weights that are trained.
        """
        return state.params
