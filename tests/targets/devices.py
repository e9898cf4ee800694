"""Devices to compile for: what XLA's compilers know of an accelerator that is not here.

Nothing runs on them. They need the compilers themselves: `make test-targets` brings them.
"""

import functools

from jax.experimental import topologies

# XLA's description of a GPU, in the text form of its GpuTargetConfig; the numbers are from the
# specifications that XLA publishes for them.
GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
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
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
GPUS = {
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB", "capability": 8, "cores": 108, "units": 64,
        "shared": 167936, "optin": 166912, "bandwidth": 2039040000000, "cache": 41943040,
        "clock": 1.41, "memory": 85100068864,
    },
    "h100": {
        "name": "NVIDIA H100 80GB HBM3", "capability": 9, "cores": 132, "units": 128,
        "shared": 233472, "optin": 232448, "bandwidth": 3352320000000, "cache": 52428800,
        "clock": 1.98, "memory": 84929347584,
    },
    "b200": {
        "name": "NVIDIA B200", "capability": 10, "cores": 148, "units": 128,
        "shared": 233472, "optin": 232448, "bandwidth": 7672320000000, "cache": 132644864,
        "clock": 1.965, "memory": 191514411008,
    },
}  # fmt: skip
# Real v4 chips run their two cores as one device; so described they do.
MEGACORE = {
    "chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "num_slices": 1,
}  # fmt: skip


@functools.cache
def devices(name: str, *, slices: int = 1):
    """Of "h100:8" eight H100s of one host; of "v5e:2x4" a TPU slice of that shape, or several."""
    kind, _, shape = name.partition(":")
    if kind in GPUS:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=kind,
            target_config=GPU.format(**GPUS[kind]),
            topology=f"1x1x{shape}",
        ).devices
    more = MEGACORE if kind == "v4" else {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
