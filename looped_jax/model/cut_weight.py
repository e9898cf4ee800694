"""A device's piece of a matrix that is gathered where it is multiplied, and nowhere kept whole.

By default a step gathers all weights once and holds them, with their gradients, whole: least
traffic. With model.gather="layer" a product gathers the matrix in the compute type, lets go of it,
gathers it again in the backward pass, and hands on its device's piece of the gradient alone, summed
in float32. That is traffic in every loop, and room for models that no device holds whole.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax

from looped_jax.errors import ArgumentError
from looped_jax.runtime import sharding

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("piece",), meta_fields=("axis", "mesh_axis")
)
@dataclass(frozen=True, eq=False)
class CutWeight:
    """Stands for the whole weight, inside shard_map, where linear.py multiplies by it.

    piece: this device's, float32, or its gradient
    axis: what is cut, the first (0) or the last (-1); mesh_axis: over which devices
    """

    piece: Array
    axis: int
    mesh_axis: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = list(self.piece.shape)
        shape[self.axis] *= jax.lax.axis_size(self.mesh_axis)
        return tuple(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> CutWeight:
        if index is not ...:
            self._refuse(f"[{index}]")
        return self

    def reshape(self, *shape: int) -> CutWeight:
        """The same with other axes beside the one that is cut; one may be -1."""
        own, cut = list(shape), self.piece.shape[self.axis]
        if own[self.axis] not in (-1, self.shape[self.axis]):
            self._refuse(f"reshape{shape}")
        own[self.axis] = cut
        return CutWeight(self.piece.reshape(own), self.axis, self.mesh_axis)

    def gather(self, dtype: Any) -> Array:
        """The whole weight, rounded before it travels."""
        axis = self.axis % self.piece.ndim
        return jax.lax.all_gather(self.piece.astype(dtype), self.mesh_axis, axis=axis, tiled=True)

    def of_sum(self, whole: Array) -> CutWeight:
        """This device's piece of a sum over all devices of whole gradients."""
        piece = sharding.scatter(whole, self.mesh_axis, self.axis)
        # The TPU's compiler would else sum whole ones over loops, and scatter the sum after them.
        return CutWeight(jax.lax.optimization_barrier(piece), self.axis, self.mesh_axis)

    def _refuse(self, what: str) -> None:
        raise ArgumentError(
            f"model.gather=layer: a matrix that layers multiply by is whole inside of a product "
            f"alone, and its {what} was asked for; multiply by linear(x, weight[...]) of "
            "model/linear.py, make it of the group vector, or take model.gather=step"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(name)

    def __rmatmul__(self, x: Any) -> None:
        self._refuse("product by @")

    def __radd__(self, x: Any) -> None:
        self._refuse("sum by +")

    def __rmul__(self, x: Any) -> None:
        self._refuse("product by *")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(weight: CutWeight, dtype: str) -> Array:
    """The whole weight as float32 numbers of `dtype`; its gradient is summed in float32.

    For what is used more than once before it is let go.
    """
    return weight.gather(dtype).astype(weight.piece.dtype)


def _gathered_forward(weight: CutWeight, dtype: str) -> tuple[Array, CutWeight]:
    return gathered(weight, dtype), weight


def _gathered_backward(dtype: str, weight: CutWeight, gradient: Array) -> tuple[CutWeight]:
    return (weight.of_sum(gradient),)


gathered.defvjp(_gathered_forward, _gathered_backward)
