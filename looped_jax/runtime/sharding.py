"""The device mesh, and how it cuts parameters, optimizer state and batches.

Axes: `data` copies weights, `fsdp` cuts weights and optimizer state, `tensor` cuts heads, hidden
units and vocabulary. The batch is cut over data × fsdp.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config.resolved import Config
from looped_jax.config.settings import MeshConfig, parse_mesh
from looped_jax.errors import ConfigError

Array = jax.Array
BATCH_AXES = ("data", "fsdp")

# Logical axis of a weight -> mesh axis that cuts it. Of two axes that would be cut alike, the first
# is. An axis that does not stand here is never cut.
AXES = {"embed": "fsdp", "latent": "fsdp", "vocab": "tensor", "heads": "tensor", "mlp": "tensor"}


class Weight(Protocol):
    """What the cut of a weight follows from; see model/weights.py."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def axes(self) -> tuple[str | None, ...]: ...


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with axes data, fsdp, tensor over all devices; an axis of -1 takes what is left.

    Neighbours in the mesh are neighbours in the network. Several slices or pods, which a slower
    network joins, are told apart along `data`, or along `fsdp` where `data` cannot be cut so.
    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(filled(config, len(devices)))
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    across = _slices_by_axis(sizes, slices)
    split = devices[0].platform == "tpu"  # an axis may cover a part of one axis of the torus
    try:
        if slices == 1:
            arranged = mesh_utils.create_device_mesh(
                shape, devices, allow_split_physical_axes=split
            )
        else:
            within = [size // n for size, n in zip(shape, across, strict=True)]
            arranged = mesh_utils.create_hybrid_device_mesh(
                within, across, devices, allow_split_physical_axes=split
            )
    except (AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"mesh {sizes} cannot be laid over {len(devices)} {devices[0].device_kind} "
            f"({reason[0]}); choose other sizes, or whole slices"
        ) from error
    return Mesh(arranged, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def filled(config: MeshConfig, devices: int) -> MeshConfig:
    """The same mesh with the size of its open axis. Raises ConfigError as `make_mesh`."""
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed == 0:
        sizes = {axis: devices // fixed if n == -1 else n for axis, n in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ConfigError(
            f"mesh data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} does not fill "
            f"{devices} devices; sizes must multiply to {devices}, one may be -1"
        )
    return MeshConfig(**sizes)


def one_device() -> Mesh:
    """The mesh of this process's first device alone."""
    return make_mesh(MeshConfig(), jax.local_devices()[:1])


def mesh_of(text: str | None, *, default: str | None = None) -> Mesh:
    """The mesh that "data=2,tensor=4" names, on the first so many devices; one device for None.

    `default` stands in for None. Raises ConfigError.
    """
    if (text := text or default) is None:
        return one_device()
    config = parse_mesh(text)
    size, devices = math.prod(dataclasses.asdict(config).values()), jax.devices()
    if 0 < size < len(devices):
        devices = devices[:size]
        if jax.process_count() > 1:
            raise ConfigError(
                f"--mesh={text} has {size} of {jax.device_count()} devices; several processes need "
                "all of them, one axis may be -1"
            )
    return make_mesh(config, devices)


def _slices_by_axis(sizes: Mapping[str, int], slices: int) -> tuple[int, int, int]:
    """How many slices every axis spans: as many as it can along `data`, the rest along `fsdp`.

    Raises ConfigError where `tensor` would have to span some.
    """
    data = math.gcd(sizes["data"], slices)
    if sizes["fsdp"] % (slices // data):
        raise ConfigError(
            f"mesh {dict(sizes)} cannot span {slices} slices: messages of `tensor` would cross the "
            f"network between them; let mesh.data × mesh.fsdp be a multiple of {slices}"
        )
    return data, slices // data, 1


def batch_devices(mesh: Mesh) -> int:
    """Devices that each take a different share of the batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class Shard:
    """The `index`-th of `count` equal parts of all rows: those that one process reads."""

    index: int = 0
    count: int = 1


EVERYTHING = Shard()


def data_shard(mesh: Mesh, process: int | None = None) -> Shard:
    """The part of the batch rows that this process (or `process`) feeds.

    It is the set of rows that the devices of one process hold, in their order: on a torus they
    need not be consecutive. Processes that differ in `tensor` alone feed the same part. Raises
    ConfigError for a mesh whose processes hold overlapping or unequal sets.
    """
    process = jax.process_index() if process is None else process
    rows: dict[int, set[int]] = defaultdict(set)
    by_row = mesh.devices.reshape(batch_devices(mesh), -1)  # data and fsdp are the first two axes
    for row, devices in enumerate(by_row):
        for device in devices:
            rows[device.process_index].add(row)
    shards = sorted({tuple(sorted(mine)) for mine in rows.values()})
    if len({row for shard in shards for row in shard}) != sum(map(len, shards)) or (
        len({len(shard) for shard in shards}) > 1
    ):
        mine = sorted(rows[process])
        raise ConfigError(
            f"mesh {dict(mesh.shape)} gives process {process} the batch rows {mine} of "
            f"{len(by_row)}, no even share; choose sizes that divide, or are multiples of, the "
            "number of devices per process"
        )
    return Shard(shards.index(tuple(sorted(rows[process]))), len(shards))


def specs(weights: Mapping[str, Weight]) -> dict[str, P]:
    """How the mesh cuts each weight, by name."""

    def spec(axes: Sequence[str | None]) -> P:
        found: list[str | None] = []
        for axis in axes:
            cut = AXES.get(axis) if axis else None
            found.append(None if cut in found else cut)
        return P(*found)

    return {name: spec(weight.axes) for name, weight in weights.items()}


def state_shardings(mesh: Mesh, state: Any, weights: Mapping[str, Weight]) -> Any:
    """NamedSharding of every leaf of parameters or of a train state, abstract or real.

    A leaf whose path ends with a weight's name is cut as that weight along every dimension that
    has the weight's size there, which holds for optimizer states of other shapes too. All other
    leaves are replicated.
    """
    cuts = specs(weights)

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", None) if path else None
        if name not in cuts or len(cuts[name]) != leaf.ndim:
            return NamedSharding(mesh, P())
        sizes = zip(cuts[name], weights[name].shape, leaf.shape, strict=True)
        return NamedSharding(mesh, P(*(axis if own == size else None for axis, own, size in sizes)))

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For [micro-batches, rows, T + 1]: rows over data × fsdp."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The batch axes that hold more than one device: those that collectives have to cross."""
    return tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)


def manual_specs(mesh: Mesh, weights: Mapping[str, Weight]) -> dict[str, P]:
    """Specs of the parameters as far as the batch axes cut them: what shard_map is told."""
    axes = batch_axes(mesh)
    return {
        name: P(*(axis if axis in axes else None for axis in spec))
        for name, spec in specs(weights).items()
    }


def gather(shards: Mapping[str, Array], specs: Mapping[str, P]) -> dict[str, Array]:
    """Whole weights from this device's shards, inside shard_map."""

    def whole(shard: Array, spec: P) -> Array:
        for axis, name in enumerate(spec):
            if name is not None:
                shard = jax.lax.all_gather(shard, name, axis=axis, tiled=True)
        return shard

    return {name: whole(shard, specs[name]) for name, shard in shards.items()}


def scatter(whole: Array, name: str, axis: int) -> Array:
    """This device's piece along `axis` of a sum over the mesh axis `name`, inside shard_map.

    Pieces are an axis of their own, the first: cut out of another, those of other sizes than
    multiples of 128 would make the TPU's compiler sum the whole on every device, for twice the
    bytes.
    """
    axis, shape, devices = axis % whole.ndim, whole.shape, jax.lax.axis_size(name)
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    size = shape[axis] // devices
    # No axis of one, and none of heads: a compiler might lay it out before that of the pieces.
    own = [n for n in (before, size, after) if n > 1]
    place = int(before > 1)
    apart = jnp.moveaxis(whole.reshape(*own[:place], devices, *own[place:]), place, 0)
    return jax.lax.psum_scatter(apart, name).reshape(*shape[:axis], size, *shape[axis + 1 :])


def put(array: np.ndarray, mesh: Mesh, spec: P) -> Array:
    """An array that every process knows whole, on the mesh as `spec` cuts it."""
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )


def fill_rows(array: np.ndarray, mesh: Mesh) -> np.ndarray:
    """`array` [rows, …] with its last row repeated until every batch device has as many rows."""
    missing = -len(array) % batch_devices(mesh)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


@dataclasses.dataclass(frozen=True)
class Shares:
    """How N whole matrices are shared out over a mesh whose axes shard or replicate them.

    replicated: devices along each replicating axis that divide matrices among themselves; the axis
    holds size / replicated such groups, which all do the same
    devices: how many devices hold different matrices; padded: N, filled up to a multiple of them
    """

    replicated: dict[str, int]
    devices: int
    padded: int

    @classmethod
    def of(cls, count: int, spec: P, mesh: Mesh) -> Shares:
        """The least work per device that at most doubles what travels.

        More matrices than there are would travel as zeros: on 512 devices with copies of twelve
        matrices, 512 of them. So groups of sixteen work on the twelve, all groups alike. Along an
        axis that cuts matrices, every device has to take part.
        """
        devices, replicated = math.prod(mesh.shape[name] for name in spec if name), {}
        for name in mesh.axis_names:
            if name in spec or mesh.shape[name] == 1:
                continue
            fits = [
                n
                for n in range(1, mesh.shape[name] + 1)
                if mesh.shape[name] % n == 0
                and (n == 1 or -count % (devices * n) + count <= 2 * count)
            ]
            replicated[name] = min(fits, key=lambda n: (-(-count // (devices * n)), n))
            devices *= replicated[name]
        return cls(replicated, devices, count + -count % devices)


def map_over_shards(
    work: Callable[[Array], Array], batch: Array, *, spec: P, mesh: Mesh | None
) -> Array:
    """work(batch) for a batch [N, a, b] of matrices cut by `spec`, each device on a share of them.

    `work` sees whole matrices [n, a, b] and treats each alone. Shards travel to the device that
    works on their matrix, and back; see Shares for how many there are.
    """
    if mesh is None or mesh.size == 1:
        return work(batch)
    cut = [(name, axis + 1) for axis, name in enumerate(spec) if name is not None]
    count, shares = len(batch), Shares.of(len(batch), spec, mesh)
    batch = jnp.pad(batch, ((0, shares.padded - count), (0, 0), (0, 0)))

    def local(shards: Array) -> Array:
        for name, members in shares.replicated.items():
            share = len(shards) // members
            place = jax.lax.axis_index(name) % members * share
            shards = jax.lax.dynamic_slice_in_dim(shards, place, share)
        for name, axis in cut:
            shards = jax.lax.all_to_all(shards, name, 0, axis, tiled=True)
        done = work(shards)
        for name, axis in reversed(cut):
            done = jax.lax.all_to_all(done, name, axis, 0, tiled=True)
        for name, members in reversed(shares.replicated.items()):
            if members > 1:
                groups = np.arange(mesh.shape[name]).reshape(-1, members).tolist()
                done = jax.lax.all_gather(done, name, tiled=True, axis_index_groups=groups)
        return done

    where = P(None, *spec)
    shared = jax.shard_map(local, mesh=mesh, in_specs=where, out_specs=where, check_vma=False)
    return shared(batch)[:count]


def check_divisible(config: Config, mesh: Mesh, weights: Mapping[str, Weight]) -> None:
    """Raise ConfigError unless the mesh cuts every parameter and the heads into equal parts."""
    m, tensor = config.model, mesh.shape["tensor"]
    for key, heads in (("heads", m.heads), ("kv_heads", m.kv_heads)):
        if heads and heads % tensor:
            raise ConfigError(
                f"mesh.tensor={tensor} does not divide model.{key}={heads}; "
                f"choose a mesh.tensor that does, or another model.{key}"
            )
    for name, spec in specs(weights).items():
        shape = weights[name].shape
        for size, axis in zip(shape, spec, strict=True):
            if axis and size % mesh.shape[axis]:
                raise ConfigError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide {name} of shape "
                    f"{tuple(shape)}; choose a divisor of {size}"
                )
