"""NorMuon: neurons of an orthogonalised update at like sizes, by a running mean of squares.

v = mean of X² over the shorter side, of a square matrix over its inputs; s ← s + (1 − β2) (v − s);
X ← X / √s, scaled so that ‖X‖ stays, so that no bias has to be corrected. Source: Li et al.,
"NorMuon: Making Muon more efficient and scalable", 2025 (arXiv 2510.05491), as nanochat has it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

Array = jax.Array
Matrices = dict[str, Array]
TINY = 1e-10


def start(matrix: Array) -> Array:
    """s of a kernel [inputs, outputs]: zeros, with one entry along the side that is reduced."""
    shape = list(matrix.shape)
    shape[_reduced(matrix.shape)] = 1
    return jnp.zeros(shape, matrix.dtype)


def normalised(
    updates: Matrices,
    second: Matrices,
    *,
    beta2: float,
    specs: Mapping[str, P],
    mesh: Mesh | None,
) -> tuple[Matrices, Matrices]:
    """Updates [inputs, outputs] by name, cut over `mesh` by `specs`, and the next s of each.

    Sums of all matrices cross each mesh axis together, twice: not once for every matrix.
    """
    shapes = {name: update.shape for name, update in updates.items()}  # whole

    def local(updates: Matrices, second: Matrices) -> tuple[Matrices, Matrices]:
        side = {name: _reduced(shape) for name, shape in shapes.items()}
        squares = {
            name: jnp.square(x).sum(axis=side[name], keepdims=True) for name, x in updates.items()
        }
        squares = _summed(squares, {name: _axis(specs[name], side[name], mesh) for name in side})
        second = {
            name: s + (1 - beta2) * (squares[name] / shapes[name][side[name]] - s)
            for name, s in second.items()
        }
        factors = {name: jax.lax.rsqrt(jnp.maximum(s, TINY)) for name, s in second.items()}
        norms = {
            name: jnp.stack([total.sum(), (total * jnp.square(factors[name])).sum()])
            for name, total in squares.items()
        }
        norms = _summed(norms, {name: _axis(specs[name], 1 - side[name], mesh) for name in side})
        updates = {
            name: x * factors[name] * _ratio(*jnp.sqrt(norms[name])) for name, x in updates.items()
        }
        return updates, second

    if mesh is None or mesh.size == 1:
        return local(updates, second)
    whole = {name: specs[name] for name in updates}
    thin = {name: _without(specs[name], _reduced(shapes[name])) for name in updates}
    where = (whole, thin)
    return jax.shard_map(local, mesh=mesh, in_specs=where, out_specs=where, check_vma=False)(
        updates, second
    )


def _reduced(shape: tuple[int, ...]) -> int:
    inputs, outputs = shape
    return 0 if outputs >= inputs else 1


def _ratio(before: Array, after: Array) -> Array:
    return before / jnp.maximum(after, TINY)


def _axis(spec: P, side: int, mesh: Mesh | None) -> str | None:
    """The mesh axis that cuts a side, if any."""
    name = spec[side]
    return name if mesh is not None and name and mesh.shape[name] > 1 else None


def _without(spec: P, side: int) -> P:
    return P(*(None if axis == side else name for axis, name in enumerate(spec)))


def _summed(arrays: Matrices, axes: Mapping[str, str | None]) -> Matrices:
    """Each array summed over its mesh axis: those of one axis in one message."""
    found = dict(arrays)
    for axis in sorted({axis for axis in axes.values() if axis}):
        flat, back = ravel_pytree({name: arrays[name] for name in arrays if axes[name] == axis})
        found |= back(jax.lax.psum(flat, axis))
    return found
