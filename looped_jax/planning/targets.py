"""Devices to compile for that are not here, and where their compilers come from.

XLA's compilers for GPUs and TPUs run on any machine; what they are told of a device stands here.
They come with `pip install 'looped_jax[targets]'`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from looped_jax.errors import ConfigError
from looped_jax.runtime import hardware
from looped_jax.runtime.hardware import Hardware

# XLA's description of a GPU, in the text form of its GpuTargetConfig. The numbers are from the
# specifications that XLA publishes, and where it has none from the vendor's data sheet.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
_AMPERE = {"major": 8, "minor": 0, "threads": 2048, "cores": 108, "units": 64, "shared": 167936,
           "optin": 166912, "cache": 41943040, "clock": 1.41}  # fmt: skip
_HOPPER = {"major": 9, "minor": 0, "threads": 2048, "cores": 132, "units": 128, "shared": 233472,
           "optin": 232448, "cache": 52428800, "clock": 1.98}  # fmt: skip
_GPUS = {
    "a100": {
        **_AMPERE, "name": "NVIDIA A100-SXM4-80GB", "bandwidth": 2039040000000,
        "memory": 85100068864,
    },
    "a100-40gb": {
        **_AMPERE, "name": "NVIDIA A100-SXM4-40GB", "bandwidth": 1555200000000,
        "memory": 42298834944,
    },
    "h100": {
        **_HOPPER, "name": "NVIDIA H100 80GB HBM3", "bandwidth": 3352320000000,
        "memory": 84929347584,
    },
    "h200": {
        **_HOPPER, "name": "NVIDIA H200", "bandwidth": 4800000000000, "memory": 151397597184,
    },
    "b200": {
        "name": "NVIDIA B200", "major": 10, "minor": 0, "threads": 2048, "cores": 148,
        "units": 128, "shared": 233472, "optin": 232448, "bandwidth": 7672320000000,
        "cache": 132644864, "clock": 1.965, "memory": 191514411008,
    },
    "rtx4090": {
        "name": "NVIDIA GeForce RTX 4090", "major": 8, "minor": 9, "threads": 1536, "cores": 128,
        "units": 128, "shared": 102400, "optin": 101376, "bandwidth": 1008000000000,
        "cache": 75497472, "clock": 2.52, "memory": 25757220864,
    },
}  # fmt: skip
_TPUS = {"v5e": "tpu-v5e", "v5p": "tpu-v5p", "v6e": "tpu-v6e"}
# One chip of a host of four, which its shape alone would not say.
_ONE_CHIP = {
    "v5e": {"chips_per_host_bounds": (1, 1, 1)},
    "v6e": {"chips_per_host_bounds": (1, 1, 1)},
}
_NAME = re.compile(r"^([a-z0-9-]+)(?::(\d+(?:x\d+)*))?$")


@dataclass(frozen=True)
class Target:
    """Devices of one kind in the order that their runtime has them.

    name: as "v5e:4x4" or "h100:8"; hardware: one of them, and its links
    """

    name: str
    hardware: Hardware
    devices: tuple[jax.Device, ...]


def find(name: str) -> Target:
    """Of "h100:8" eight H100s of one host, "a100:2x8" two hosts of them, "rtx4090" one;
    "v5e:4x4" a TPU slice of that shape.

    Needs no such device, but its compiler; call `look_for_compilers` before JAX looks for devices.
    Raises ConfigError for an unknown device, a shape that it does not come in, and for a compiler
    that is not installed.
    """
    kind, shape = parse(name)
    return Target(name, device(name), tuple(_gpus(kind, shape) if kind in _GPUS else _tpus(name)))


def device(name: str) -> Hardware:
    """One device of a target, and its links. Raises ConfigError as `find`, installed or not."""
    kind, _ = parse(name)
    return hardware.find(_TPUS.get(kind, kind))


def size(name: str) -> int:
    """How many devices a target has. Raises ConfigError as `find`, installed or not."""
    count = 1
    for n in parse(name)[1]:
        count *= n
    return count


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """ "a100:2x8" as ("a100", (2, 8)). Raises ConfigError for what is none of the known."""
    found = _NAME.match(name.lower())
    kind = found[1].removeprefix("tpu-") if found else ""
    if not found or kind not in {**_GPUS, **_TPUS}:
        raise ConfigError(
            f"--target={name} is unknown; give devices and their number, as h100:8 or a100:2x8 "
            f"(hosts × devices), or a TPU slice by its shape, as v5e:4x4; known: "
            f"{', '.join((*_GPUS, *_TPUS))}"
        )
    shape = tuple(int(n) for n in (found[2] or "1").split("x"))
    axes = {"v5p": 3}.get(kind, 2)
    if kind in _GPUS and len(shape) > 2 or kind in _TPUS and len(shape) != axes or 0 in shape:
        example = "8 or 2x8" if kind in _GPUS else "x".join("4" * axes)
        raise ConfigError(f"--target={name} has no such shape; {kind}: {example}")
    return kind, shape


def look_for_compilers(name: str) -> None:
    """Let JAX find the compiler of a target. Must come before JAX looks for devices.

    Raises ConfigError for a compiler that is not installed.
    """
    kind, _ = parse(name)
    module = "jax_plugins.xla_cuda12" if kind in _GPUS else "libtpu"
    known = [module, "jax_plugins.xla_cuda13"] if kind in _GPUS else [module]
    if not any(_installed(one) for one in known):
        raise ConfigError(
            f"--target={name} wants the compiler of {'NVIDIA GPUs' if kind in _GPUS else 'TPUs'}, "
            "which is not installed; pip install 'looped_jax[targets]' (2.5 GB, no such device is "
            "needed), or leave --target out for the arithmetic alone"
        )
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # no driver is here, and nothing will run
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    jax.config.update("jax_platforms", "cpu,cuda" if kind in _GPUS else "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what is written is not read back


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


@functools.cache
def _gpus(kind: str, shape: tuple[int, ...]) -> Sequence[jax.Device]:
    hosts, each = shape if len(shape) == 2 else (1, *shape)
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=kind,
        target_config=_GPU.format(**_GPUS[kind]),
        topology=f"1x{hosts}x{each}",
    ).devices


@functools.cache
def _tpus(name: str) -> Sequence[jax.Device]:
    kind, shape = parse(name)
    more = _ONE_CHIP.get(kind, {}) if set(shape) == {1} else {}
    slice_name = f"{kind}:{'x'.join(map(str, shape))}"
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=slice_name, **more
        ).devices
    except Exception as error:  # the runtime has no type of its own for it
        raise ConfigError(f"--target={name} is no slice that TPUs come in: {error}") from error
