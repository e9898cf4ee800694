"""What devices can do: peaks, fused attention, and of those the planner knows memory and links."""

from __future__ import annotations

import difflib
import functools
import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from looped_jax.errors import ConfigError
from looped_jax.runtime import distributed

# Dense bfloat16 peak of one device, FLOP/s, from the vendors' data sheets; first match wins.
PEAK_FLOPS = {
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


class AttentionSupport(NamedTuple):
    """Fused attention of one kind of device. platform: JAX's name, "cpu", "gpu" or "tpu".

    kernel: "cudnn", "splash" or None; missing: why there is none where one might expect it
    """

    platform: str
    kernel: str | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Hardware:
    """One device and its surroundings. Rates are in one direction and as the vendor states them.

    platform: JAX's name, "gpu" or "tpu"; peak_flops: dense bfloat16, FLOP/s
    memory: bytes; memory_bandwidth: bytes/s
    link: bytes/s a device sends along one mesh axis over NVLink or ICI, which reaches `per_node`
    devices; network: bytes/s beyond them, a device's share of its host's
    clock: Hz in which a TPU's compiler counts, by which its matrix units have their peak
    """

    name: str
    platform: str
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link: float
    per_node: int
    network: float
    source: str
    clock: float = 0.0

    @property
    def attention(self) -> AttentionSupport:
        """The fused attention that is written for it."""
        return AttentionSupport(self.platform, {"gpu": "cudnn", "tpu": "splash"}[self.platform])


_DGX = "data sheets of the device and of NVIDIA's DGX with eight of them"
_CARD = "data sheet of the card, and PCIe 4.0 between cards"
_CLOUD = "Google Cloud TPU documentation; ICI total divided by the axes of the torus"

HARDWARE = {
    known.name: known
    for known in (
        Hardware("h100", "gpu", PEAK_FLOPS["H100"], 80e9, 3.35e12, 450e9, 8, 50e9, _DGX),
        Hardware("h200", "gpu", PEAK_FLOPS["H200"], 141e9, 4.8e12, 450e9, 8, 50e9, _DGX),
        Hardware("b200", "gpu", PEAK_FLOPS["B200"], 180e9, 8e12, 900e9, 8, 50e9, _DGX),
        Hardware("a100", "gpu", PEAK_FLOPS["A100"], 80e9, 2.039e12, 300e9, 8, 25e9, _DGX),
        Hardware("a100-40gb", "gpu", PEAK_FLOPS["A100"], 40e9, 1.555e12, 300e9, 8, 25e9, _DGX),
        Hardware(
            "rtx4090", "gpu", PEAK_FLOPS["RTX 4090"], 24 * 2**30, 1.008e12, 25e9, 8, 3e9, _CARD
        ),
        Hardware(
            "tpu-v5e", "tpu", PEAK_FLOPS["TPU v5 lite"],
            16e9, 819e9, 100e9, 256, 3.125e9, _CLOUD, 1.5e9,
        ),
        Hardware(
            "tpu-v5p", "tpu", PEAK_FLOPS["TPU v5p"],
            95 * 2**30, 2.765e12, 200e9, 8960, 6.25e9, _CLOUD, 1.75e9,
        ),
        Hardware(
            "tpu-v6e", "tpu", PEAK_FLOPS["TPU v6 lite"],
            32e9, 1.638e12, 200e9, 256, 12.5e9, _CLOUD, 1.75e9,
        ),
    )
}  # fmt: skip


def find(name: str) -> Hardware:
    """The hardware called `name`, in any case. Raises ConfigError with the names that exist."""
    if (key := name.lower()) not in HARDWARE:
        near = difflib.get_close_matches(key, HARDWARE, n=1, cutoff=0.4)
        guess = f"did you mean {near[0]}? known: " if near else "choose one of "
        raise ConfigError(f"--hardware={name} is unknown; {guess}{', '.join(HARDWARE)}")
    return HARDWARE[key]


def memory_limit(device: jax.Device) -> int | None:
    """Bytes that programs may use of a device's memory; None where it does not say, as a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def device_peak_flops(device: jax.Device) -> tuple[float, str]:
    """FLOP/s one device can do, and where the number comes from.

    An unlisted device (a CPU, say) is measured: float32 matrix product of 1024 × 1024, best of 5.
    """
    for name, peak in PEAK_FLOPS.items():
        if name.lower() in device.device_kind.lower():
            return peak, f"{name} data sheet, bfloat16"
    size = 1024
    with jax.default_device(device):
        product = jax.jit(jnp.matmul)
        x = jnp.ones((size, size))
        product(x, x).block_until_ready()
        seconds = math.inf
        for _ in range(5):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            seconds = min(seconds, time.perf_counter() - start)
    return 2 * size**3 / seconds, "measured float32 matmul"


OLDEST_GPU = (8, 0)  # compute capability from which cuDNN has flash attention


def attention_support(mesh: Mesh) -> AttentionSupport:
    """What the devices of `mesh` offer, be they here or only targets to compile for.

    Devices that are here are tried, by every process, and one failure counts for all: call it in
    all processes.
    """
    devices = mesh.local_devices or list(mesh.devices.flat)
    here = devices[0] in jax.local_devices()
    alone = len({device.process_index for device in mesh.devices.flat}) == 1
    with jax.ensure_compile_time_eval():  # inside of a traced program nothing would be tried
        return support_of(devices[0], here=here, alone=alone)


def support_of(device: jax.Device, *, here: bool, alone: bool = True) -> AttentionSupport:
    """What one device offers; if it is `here`, as tried, `alone` or in all processes."""
    if device.platform == "tpu":
        return AttentionSupport("tpu", "splash")
    if device.platform != "gpu":
        return AttentionSupport(device.platform)
    capability = str(getattr(device, "compute_capability", ""))
    if not capability.replace(".", "").isdigit():  # ROCm says gfx90a
        return AttentionSupport("gpu", None, f"cudnn needs NVIDIA, this is {device.device_kind}")
    if tuple(map(int, capability.split("."))) < OLDEST_GPU:
        oldest = ".".join(map(str, OLDEST_GPU))
        return AttentionSupport(
            "gpu", None,
            f"cudnn needs compute capability {oldest}, {device.device_kind} has {capability}",
        )  # fmt: skip
    if here and (failure := _cudnn_failure(device, alone)):
        return AttentionSupport("gpu", None, f"cudnn fails on {device.device_kind}: {failure}")
    return AttentionSupport("gpu", "cudnn")


@functools.cache
def _cudnn_failure(device: jax.Device, alone: bool) -> str | None:
    """What goes wrong with cuDNN's attention, here or in any process, found out once.

    Pairs of CUDA and cuDNN exist that load but cannot build the kernel (jax issue 32430).
    """
    mine = _try_cudnn(device)
    return mine if alone else next(filter(None, distributed.gather_json(mine)), None)


def _try_cudnn(device: jax.Device) -> str | None:
    """The first line of what a small forward and backward pass raises, if it raises."""

    def total(x: jax.Array) -> jax.Array:
        mixed = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
        return mixed.astype(jnp.float32).sum()

    try:
        with jax.default_device(device):
            x = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
            jax.block_until_ready(jax.jit(jax.grad(total))(x))
    except Exception as error:  # whatever it is, plain attention works
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return None
