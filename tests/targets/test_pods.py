"""The share of every host on the real device orders of pods; nothing is compiled."""

from collections import defaultdict

import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config.settings import MeshConfig
from looped_jax.errors import ConfigError
from looped_jax.runtime import sharding
from tests.targets.devices import devices

pytestmark = pytest.mark.targets

PODS = {
    "v5e:4x4": 1, "v5e:16x16": 1, "v5p:4x4x4": 1, "v6e:8x8": 1, "v4:4x4x4": 1, "v4:2x2x4": 1,
    "v5e:4x8": 2, "v5p:2x2x4": 2,
}  # fmt: skip
MESHES = ("data", "fsdp", "data, fsdp=4", "data, fsdp=8", "data=2, fsdp", "data, tensor=2",
          "data, fsdp=2, tensor=4", "fsdp, tensor=2")  # fmt: skip


def make_config(text):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for part in text.split(", "):
        axis, _, size = part.partition("=")
        sizes[axis] = int(size or -1)
    return MeshConfig(**sizes)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("pod", PODS)
def test_every_host_feeds_the_rows_that_its_devices_hold(pod, mesh):
    all_devices = devices(pod, slices=PODS[pod])
    made = sharding.make_mesh(make_config(mesh), all_devices)
    rows = sharding.batch_devices(made)
    held = defaultdict(set)
    cuts = NamedSharding(made, P(sharding.BATCH_AXES)).devices_indices_map((rows,))
    for device, (cut,) in cuts.items():
        held[device.process_index] |= set(range(rows)[cut])
    fed = defaultdict(set)
    for process, mine in held.items():
        shard = sharding.data_shard(made, process)
        assert len(mine) * shard.count == rows
        fed[shard.index].add(tuple(sorted(mine)))
    assert sorted(fed) == list(range(shard.count))
    assert all(len(each) == 1 for each in fed.values())  # equal shares are equal rows
    assert sorted(r for each in fed.values() for r in next(iter(each))) == list(range(rows))


@pytest.mark.parametrize("mesh", ["data", "fsdp", "data, fsdp=4"])
def test_between_slices_only_the_outermost_axis_talks(mesh):
    made = sharding.make_mesh(make_config(mesh), devices("v5e:4x8", slices=2))
    slices = np.vectorize(lambda device: device.slice_index)(made.devices)
    outermost = next(i for i, size in enumerate(made.devices.shape) if size > 1)
    for axis in range(slices.ndim):
        crosses = (np.diff(slices, axis=axis) != 0).any()
        assert crosses == (axis == outermost)


def test_a_mesh_that_has_to_cut_heads_between_slices_is_refused():
    with pytest.raises(ConfigError, match="cannot span 2 slices"):
        sharding.make_mesh(MeshConfig(1, 1, -1), devices("v5e:4x8", slices=2))
