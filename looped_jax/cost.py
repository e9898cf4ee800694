"""What a model costs: parameters, and floating-point operations per token that count the loops.

The reference's figure ignores K and windows, which at L = 6, K = 12 reports a third of the work;
it is kept beside ours so that runs can be compared with its logs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from looped_jax.config import ModelConfig

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


@dataclass(frozen=True)
class Cost:
    """Counts of one model. FLOPs are per token of a training step: forward 1/3, backward 2/3.

    parameters: all weights, padding included; looped: those in the blocks, used K times
    flops: true training FLOPs per token; reference_flops: as the reference counts, K ignored
    """

    parameters: int
    looped: int
    flops: float
    reference_flops: float


def count(config: ModelConfig) -> Cost:
    """Parameters and training FLOPs per token of a resolved config.

    6 FLOPs per weight use, 12 · H · Dh per visible key and layer for attention (not halved for
    causality, the field's convention); recomputation for rematerialisation is not counted.
    """
    assert config.width and config.kv_heads
    width, table = config.width, config.padded_vocab * config.width
    kv_width = config.kv_heads * config.head_dim
    kv = 2 * width * kv_width
    if config.attention == "mla":
        kv = width * config.latent_rank + 2 * config.latent_rank * kv_width
    looped = config.layers * (2 * width * width + kv + 8 * width * width)
    keys = sum(min(w or config.seq_len, config.seq_len) for w in config.windows())
    loop = 6 * looped + 12 * width * keys
    return Cost(
        parameters=looped + 2 * table,
        looped=looped,
        flops=6 * table * len(config.scored_loops()) + config.loops * loop,
        reference_flops=6 * table + 6 * looped + 12 * width * config.seq_len * config.layers,
    )


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
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds), "measured float32 matmul"
