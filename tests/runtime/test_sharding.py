"""Meshes over hosts whose devices do not stand in a row, and what each host feeds them."""

import ast
import functools
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from looped_jax.config.settings import MeshConfig, OptimConfig
from looped_jax.errors import ConfigError
from looped_jax.model.weights import Weight
from looped_jax.planning import collectives
from looped_jax.runtime import sharding
from looped_jax.training import optimizers
from tests import QUICK

ROOT = Path(__file__).parents[2]


class Chip(SimpleNamespace):
    __hash__ = object.__hash__


def v5e(rows, columns, slices=1):
    """Chips of a torus as a TPU lists them, four to a host; a host holds a square of 2 × 2."""
    chips = []
    for part in range(slices):
        for row in range(0, rows, 2):
            for column in range(0, columns, 2):
                host = len(chips) // 4
                for x, y in ((0, 0), (1, 0), (0, 1), (1, 1)):
                    chips.append(
                        Chip(
                            platform="tpu", device_kind="TPU v5 lite", id=len(chips),
                            process_index=host, slice_index=part, core_on_chip=0,
                            coords=[column + x, row + y, 0],
                        )
                    )  # fmt: skip
    return chips


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("sizes", [(-1, 1, 1), (1, -1, 1), (-1, 4, 1), (-1, 1, 4), (-1, 2, 2)])
def test_hosts_of_a_torus_feed_the_rows_they_hold(sizes, slices):
    """Row 0 to 3 of a host would be refused, or wrong: its square lies across the rows."""
    mesh = sharding.make_mesh(MeshConfig(*sizes), v5e(4, 4, slices))
    by_row = mesh.devices.reshape(sharding.batch_devices(mesh), -1)
    rows_of = {}
    for host in range(4 * slices):
        mine = [i for i, row in enumerate(by_row) if any(c.process_index == host for c in row)]
        shard = sharding.data_shard(mesh, host)
        assert rows_of.setdefault(shard.index, mine) == mine
        assert len(mine) * shard.count == len(by_row)
    assert sorted(sum(rows_of.values(), [])) == list(range(len(by_row)))


@pytest.mark.parametrize(
    ("sizes", "slices", "across"),
    [
        ((2, 2, 8), 4, (2, 2, 1)), ((4, 2, 8), 8, (4, 2, 1)), ((2, 16, 1), 4, (2, 2, 1)),
        ((8, 4, 1), 2, (2, 1, 1)), ((1, 32, 1), 2, (1, 2, 1)), ((3, 8, 1), 4, (1, 4, 1)),
    ],
)  # fmt: skip
def test_slices_are_spanned_by_the_batch_axes_together(sizes, slices, across):
    named = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert sharding._slices_by_axis(named, slices) == across


def test_meshes_that_fit_no_slice_are_refused_by_name():
    with pytest.raises(ConfigError, match="tensor` would cross the network"):
        sharding.make_mesh(MeshConfig(1, 1, -1), v5e(4, 4, 2))
    with pytest.raises(ConfigError, match="cannot be laid over 6 TPU v5 lite"):
        sharding.make_mesh(MeshConfig(6, 1, 1), v5e(4, 4)[:6])


def test_uneven_shares_are_refused():
    hosts = [SimpleNamespace(process_index=host) for host in (0, 0, 0, 1)]
    mesh = SimpleNamespace(
        devices=np.array(hosts).reshape(4, 1, 1), shape={"data": 4, "fsdp": 1, "tensor": 1}
    )
    with pytest.raises(ConfigError, match=r"gives process 0 the batch rows \[0, 1, 2\] of 4"):
        sharding.data_shard(mesh, 0)


FEED = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from looped_jax.runtime import distributed
from looped_jax.runtime import sharding
distributed.initialize()
place = [jax.devices()[i] for i in (0, 4, 6, 2, 5, 1, 3, 7)]  # four of each process
mesh = Mesh(np.array(place).reshape(4, 2, 1), ("data", "fsdp", "tensor"))
shard = sharding.data_shard(mesh)
assert shard.count == 2
rows = np.arange(16).reshape(16, 1) * np.ones((1, 3), int)  # row r holds r
mine = [r for r in range(8) if mesh.devices.reshape(8)[r].process_index == jax.process_index()]
batch = np.concatenate([rows[2 * r : 2 * r + 2] for r in mine])[None]
where = sharding.batch_sharding(mesh)
whole = jax.make_array_from_process_local_data(where, batch)
assert whole.shape == (1, 16, 3)
for part in whole.addressable_shards:
    np.testing.assert_array_equal(part.data[0], rows[part.index[1]])
weigh = lambda x: (x * np.arange(16)[:, None]).sum()
total = jax.jit(weigh, out_shardings=NamedSharding(mesh, P()))(whole)
assert int(total) == 3 * sum(r * r for r in range(16))
print("fed", shard.index)
"""


def test_interleaved_rows_of_two_processes_arrive_where_they_belong():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", FEED], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                "PATH": "", "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                "LOOPED_JAX_COORDINATOR": f"localhost:{port}", "LOOPED_JAX_PROCESSES": "2",
                "LOOPED_JAX_PROCESS": str(process),
            },
        )
        for process in range(2)
    ]  # fmt: skip
    answers = [program.communicate(timeout=120) for program in programs]
    assert [p.returncode for p in programs] == [0, 0], [err[-2000:] for _, err in answers]
    assert sorted(out.split("fed ")[1].strip() for out, _ in answers) == ["0", "1"]


MATRICES = {
    "attention.query": Weight((384, 384), ("embed", "heads"), "matrix"),
    "mlp.up": Weight((384, 1536), ("embed", "mlp"), "matrix"),
    "mlp.down": Weight((1536, 384), ("mlp", "embed"), "matrix"),
}
MESHES = ((512, 1, 1), (64, 8, 1), (128, 2, 2))


@functools.cache
def traffic_on(meshes):
    """What `traffic` finds on meshes of 512 devices, which takes another process, by mesh."""
    program = (
        "from tests.runtime.test_sharding import traffic\n"
        f"print([traffic(sizes) for sizes in {meshes}])"
    )
    flags = f"--xla_force_host_platform_device_count=512 {QUICK}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(meshes, ast.literal_eval(done.stdout.splitlines()[-1]), strict=True))


def traffic(sizes):
    """Bytes that one device sends for Muon in one step, and those of all matrices together."""
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices())
    weights = {f"blocks.{n}.{name}": m for n in range(6) for name, m in MATRICES.items()}
    shapes = {name: jax.ShapeDtypeStruct(w.shape, "float32") for name, w in weights.items()}
    muon = optimizers.scale_by_muon(OptimConfig(newton_schulz_dtype="float32"), weights, mesh)
    where = sharding.state_shardings(mesh, shapes, weights)

    def update(grads):
        with jax.named_scope("optimizer"):
            return muon.update(grads, muon.init(grads))[0]

    program = jax.jit(update, in_shardings=(where,), out_shardings=where).lower(shapes).compile()
    sent = collectives.read(program, mesh)
    whole = sum(4 * matrix.size for matrix in weights.values())
    return sum(c.bytes_sent for c in sent), whole


@pytest.mark.parametrize(
    ("sizes", "meshes"),
    [
        *((sizes, MESHES) for sizes in MESHES),
        pytest.param((4, 128, 1), ((4, 128, 1),), marks=pytest.mark.slow),
    ],
)
def test_on_many_devices_matrices_travel_as_often_as_on_few(sizes, meshes):
    """Shared out among all of 512 devices, twelve matrices would travel as 512."""
    sent, whole = traffic_on(meshes)[sizes]
    assert 0 < sent < 2 * whole


@pytest.mark.parametrize(
    ("count", "spec", "sizes", "devices", "padded"),
    [
        (12, P(None, None), (512, 1, 1), 16, 16),
        (12, P("fsdp", None), (64, 8, 1), 16, 16),
        (16, P("fsdp", None), (1, 8, 1), 8, 16),
        (24, P("fsdp", "tensor"), (8, 2, 2), 32, 32),
        (3, P(None, None), (7, 1, 1), 1, 3),  # seven devices would send more than twice three
        (1, P(None, None), (8, 1, 1), 1, 1),
        (2, P("fsdp", None), (2, 8, 1), 8, 8),  # an axis that cuts has to take part
    ],
)
def test_how_matrices_are_shared_out(count, spec, sizes, devices, padded):
    mesh = SimpleNamespace(
        shape=dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)),
        axis_names=("data", "fsdp", "tensor"),
    )
    shares = sharding.Shares.of(count, spec, mesh)
    assert (shares.devices, shares.padded) == (devices, padded)


def test_the_mesh_of_a_flag_takes_the_first_devices():
    assert sharding.mesh_of(None).size == 1
    assert sharding.mesh_of(None, default="data=-1").size == jax.device_count()
    mesh = sharding.mesh_of("data=2,tensor=2")
    assert isinstance(mesh, Mesh) and mesh.shape == {"data": 2, "fsdp": 1, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()[:4]
    with pytest.raises(ConfigError, match="does not fill 8 devices"):
        sharding.mesh_of("data=16")
