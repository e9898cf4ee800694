"""Groups of weights, each updated in a way of its own: a weight names its group where it is made.

A part whose weights need a rate of their own registers a group in its file:

    @WEIGHT_GROUPS.register("mine")
    class Mine(WeightGroup):
        \"\"\"Gates of mine.\"\"\"

It is then a choice of `weight(..., group="mine")`, and has settings under `optim.groups.mine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from looped_jax.config.options import at_least, setting
from looped_jax.config.registry import WEIGHT_GROUPS


@dataclass(frozen=True)
class GroupSettings:
    """How a group is updated; what is not given is as in the group that it belongs to."""

    learning_rate: float | None = at_least(0.0, None, "at its peak")
    beta1: float | None = at_least(0.0, None, "decay of the mean gradient", high=1.0)
    beta2: float | None = at_least(0.0, None, "decay of the mean square", high=1.0)
    eps: float | None = at_least(0.0, None, "added to the root of the mean square")
    weight_decay: float | None = at_least(0.0, None, "decoupled, times the learning rate")
    warmup_steps: int | None = at_least(
        0, None, "in which the rate rises, beside the warm-up of all; by default 0"
    )
    width_scaling: bool | None = setting(
        None, "whether its rate is times (D / 768) ** -0.5; by default all but Muon's are"
    )
    batch_scaling: bool | None = setting(
        None, "whether optim.reference_batch_tokens scales its rate; by default all are"
    )


class WeightGroup:
    """One group; its docstring says what it holds.

    parent: the group whose rate and other settings it has where it is given none of its own. Those
    without one are "matrix", "table", "head" and "vector": an optimizer knows how to update these.
    logged: whether every step logs its weights, a few scalars, as `scalars/NAME`
    """

    Settings: ClassVar[type[GroupSettings]] = GroupSettings
    parent: ClassVar[str | None] = "vector"
    logged: ClassVar[bool] = False


@WEIGHT_GROUPS.register("matrix")
class Matrix(WeightGroup):
    """Matrices, which Muon updates, at optim.matrix_learning_rate."""

    parent = None


@WEIGHT_GROUPS.register("table")
class Table(WeightGroup):
    """Embeddings, at optim.embedding_learning_rate."""

    parent = None


@WEIGHT_GROUPS.register("head")
class Head(WeightGroup):
    """The head, at optim.head_learning_rate."""

    parent = None


@WEIGHT_GROUPS.register("vector")
class Vector(WeightGroup):
    """Scalars and vectors, at optim.vector_learning_rate."""

    parent = None


@dataclass(frozen=True)
class LowRankSettings(GroupSettings):
    """As of every group; AdamW moves all entries alike, and products of two add up."""

    learning_rate: float | None = at_least(0.0, 0.001, "at its peak")


@WEIGHT_GROUPS.register("low_rank")
class LowRank(WeightGroup):
    """Thin matrices of every loop, through a few channels."""

    Settings = LowRankSettings


def lineage(group: str) -> tuple[str, ...]:
    """A group, the one that it belongs to, and so on; the last is one of the four."""
    parent = WEIGHT_GROUPS[group].parent
    return (group, *(lineage(parent) if parent else ()))
