"""What every weight says about itself where it is made: its axes, and who updates it.

From this follow how it is cut over devices, its optimizer and its checkpoint name; no table
elsewhere names a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
from flax import nnx

from looped_jax.config.registry import WEIGHT_GROUPS
from looped_jax.model.weight_groups import lineage

Array = jax.Array


@dataclass(frozen=True)
class Weight:
    """shape and logical axes of one weight, and its optimizer group.

    axes: a name for each dimension, as runtime/sharding.py maps them to the mesh, or None
    group: one of model/weight_groups.py: "matrix" (Muon), "table" and "head" (AdamW at the
    embedding's and the head's rate), "vector" (AdamW at the rate of scalars and vectors), or one
    that belongs to them
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    group: str

    @property
    def kind(self) -> str:
        """Of the four groups without a parent the one that `group` belongs to."""
        return lineage(self.group)[-1]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Weights = Mapping[str, Weight]


def weight(value: Array, *axes: str | None, group: str = "matrix") -> nnx.Param:
    """A parameter that knows its axes and its group. Raises ValueError for what does not fit."""
    known = group in WEIGHT_GROUPS
    if len(axes) != value.ndim or not known or (lineage(group)[-1] == "matrix" and value.ndim != 2):
        raise ValueError(
            f"a weight of shape {value.shape} got axes {axes} and group {group!r}; name an axis or "
            f"None for every dimension, and of groups one of {', '.join(WEIGHT_GROUPS)}; a matrix "
            "has two axes"
        )
    # A weak type, as of jnp.full, would be lost in the first update: the step would compile twice.
    return nnx.Param(value.astype(value.dtype), axes=axes, group=group)


def described(module: nnx.Module) -> dict[str, Weight]:
    """Every weight of a module, abstract or real, by the name that it has on disk."""
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        meta = leaf.get_metadata()
        found[".".join(map(str, path))] = Weight(
            tuple(leaf.get_value().shape), tuple(meta["axes"]), meta["group"]
        )
    return found
