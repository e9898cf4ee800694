"""The device mesh, and one table that says how every parameter and optimizer leaf is cut.

Axes: `data` copies weights, `fsdp` cuts weights and optimizer state, `tensor` cuts heads, hidden
units and vocabulary. The batch is cut over data × fsdp.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config import Config, ConfigError, MeshConfig

Array = jax.Array
BATCH_AXES = ("data", "fsdp")

# Parameter name -> spec of its (inputs, outputs) axes. An optimizer leaf that belongs to a
# parameter carries its name as the last key of its path and is cut the same way.
RULES = (
    (r"embed", P("tensor", "fsdp")),
    (r"head", P("fsdp", "tensor")),
    (r"blocks\.\d+\.attention\.(query|key|value)", P("fsdp", "tensor")),
    (r"blocks\.\d+\.attention\.latent", P("fsdp", None)),
    (r"blocks\.\d+\.attention\.out", P("tensor", "fsdp")),
    (r"blocks\.\d+\.mlp\.up", P("fsdp", "tensor")),
    (r"blocks\.\d+\.mlp\.down", P("tensor", "fsdp")),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh with axes data, fsdp, tensor over all devices; an axis of -1 takes what is left.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(devices) % fixed == 0:
        sizes = {axis: len(devices) // fixed if n == -1 else n for axis, n in sizes.items()}
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ConfigError(
            f"mesh data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} does not fill "
            f"{len(devices)} devices; sizes must multiply to {len(devices)}, one may be -1"
        )
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_devices(mesh: Mesh) -> int:
    """Devices that each take a different share of the batch."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process feeds the i-th of n equal, consecutive shares of the batch rows.

    Processes that differ in `tensor` alone feed the same share. Raises ConfigError for a mesh whose
    processes hold no such shares.
    """
    rows = batch_devices(mesh)
    places = NamedSharding(mesh, P(BATCH_AXES)).devices_indices_map((rows,))
    here = jax.process_index()
    local = set(jax.local_devices())
    mine = {cut[0].start or 0 for device, cut in places.items() if device in local}
    first, size = min(mine), len(mine)
    if rows % size or first % size or max(mine) != first + size - 1:
        raise ConfigError(
            f"mesh {dict(mesh.shape)} gives process {here} the batch rows {sorted(mine)} of "
            f"{rows}, no even share; choose sizes that divide, or are multiples of, the number of "
            "devices per process"
        )
    return first // size, rows // size


def spec_of(name: str) -> P:
    """The spec of the parameter `name`; exactly one rule must match, else KeyError."""
    matches = [spec for pattern, spec in RULES if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise KeyError(f"{name!r} matches {len(matches)} sharding rules; it must match one")
    return matches[0]


def param_specs(params: Mapping[str, Any]) -> dict[str, P]:
    """Spec of every parameter of the flat dict."""
    return {name: spec_of(name) for name in params}


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """NamedSharding of every leaf of a train state (abstract or real); scalars are copied."""

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, spec_of(path[-1].key))

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For [micro-batches, rows, T + 1]: rows over data × fsdp."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The batch axes that hold more than one device: those that collectives have to cross."""
    return tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)


def manual_specs(mesh: Mesh, params: Mapping[str, Any]) -> dict[str, P]:
    """Specs of the parameters as far as the batch axes cut them: what shard_map is told."""
    axes = batch_axes(mesh)
    return {
        name: P(*(axis if axis in axes else None for axis in spec))
        for name, spec in param_specs(params).items()
    }


def in_shares(work: Callable[[Array], Array], batch: Array, *, spec: P, mesh: Mesh | None) -> Array:
    """work(batch) for a batch [N, a, b] of matrices cut by `spec`, N / devices of them on each.

    `work` sees whole matrices [n, a, b] and treats each alone. Shards travel to the device that
    works on their matrix, and back; N is filled up with zeros to a multiple of the mesh's size.
    """
    if mesh is None or mesh.size == 1:
        return work(batch)
    cut = [(name, axis + 1) for axis, name in enumerate(spec) if name is not None]
    copied = [name for name in mesh.axis_names if name not in spec]
    count = len(batch)
    batch = jnp.pad(batch, ((0, -count % mesh.size), (0, 0), (0, 0)))

    def local(shards: Array) -> Array:
        for name, axis in cut:
            shards = jax.lax.all_to_all(shards, name, 0, axis, tiled=True)
        for name in copied:
            share = len(shards) // mesh.shape[name]
            place = jax.lax.axis_index(name) * share
            shards = jax.lax.dynamic_slice_in_dim(shards, place, share)
        done = work(shards)
        for name in reversed(copied):
            done = jax.lax.all_gather(done, name, tiled=True)
        for name, axis in reversed(cut):
            done = jax.lax.all_to_all(done, name, axis, 0, tiled=True)
        return done

    where = P(None, *spec)
    shares = jax.shard_map(local, mesh=mesh, in_specs=where, out_specs=where, check_vma=False)
    return shares(batch)[:count]


def check_divisible(config: Config, mesh: Mesh, shapes: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the mesh cuts every parameter and the heads into equal parts."""
    m, tensor = config.model, mesh.shape["tensor"]
    for key, heads in (("heads", m.heads), ("kv_heads", m.kv_heads)):
        if heads and heads % tensor:
            raise ConfigError(
                f"mesh.tensor={tensor} does not divide model.{key}={heads}; "
                f"choose a mesh.tensor that does, or another model.{key}"
            )
    for name, leaf in shapes.items():
        for size, axis in zip(leaf.shape, spec_of(name), strict=True):
            if axis and size % mesh.shape[axis]:
                raise ConfigError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide {name} of shape "
                    f"{tuple(leaf.shape)}; choose a divisor of {size}"
                )
