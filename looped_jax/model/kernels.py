"""Which program computes attention: plain XLA, cuDNN's flash attention, or the TPU splash kernel.

All of them honour windows and grouped heads, and take queries from wherever they come. The fused
ones never hold the [T, T] weights; they want shapes that their hardware can cut into tiles, and
say which.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from looped_jax.config import ConfigError, ModelConfig

Array = jax.Array
OF_PLATFORM = {"gpu": "cudnn", "tpu": "splash"}
PART = 256  # queries of plain attention that are worth a part of their own
TILE = 128  # tokens and head entries that a TPU works on at once


def choose(config: ModelConfig, *, time: int, tensor: int = 1, platform: str | None = None) -> str:
    """The kernel for rows of `time` tokens: config.kernel, or with "auto" the platform's.

    `tensor` is the number of devices that the heads are cut over. "auto" falls back to "xla" where
    the platform's kernel cannot be used; a kernel asked for by name raises ConfigError instead.
    """
    platform = platform or jax.default_backend()
    wanted = config.kernel
    name = OF_PLATFORM.get(platform, "xla") if wanted == "auto" else wanted
    problem = _problem(name, config, time, tensor, platform)
    if problem and wanted != "auto":
        raise ConfigError(f"model.kernel={name} {problem}; or choose model.kernel=auto")
    return "xla" if problem else name


def _problem(name: str, config: ModelConfig, time: int, tensor: int, platform: str) -> str | None:
    """What stands in the way of a kernel, and the mend; None if nothing does."""
    if name == "cudnn":
        if platform != "gpu":
            return f"needs an NVIDIA GPU, this is {platform}"
        if config.dtype != "bfloat16":
            return f"computes in bfloat16 alone; set model.dtype=bfloat16, not {config.dtype}"
        if config.head_dim % 8 or config.head_dim > 128:
            return (
                f"wants heads of a width up to 128 in steps of 8, not {config.head_dim}; "
                "change model.heads"
            )
    if name == "splash":
        if time % TILE or config.head_dim % TILE:
            return (
                f"works on tiles of {TILE}: rows of {time} tokens and heads of {config.head_dim} "
                "do not divide; change model.seq_len or model.heads"
            )
        if tensor > 1:
            return f"cannot cut heads over mesh.tensor={tensor}; set mesh.tensor=1"
    return None


def attend(kernel: str, query: Array, key: Array, value: Array, window: int | None) -> Array:
    """Causal softmax attention, [B, T, H, Dh] over [B, T, G, Dh] -> [B, T, H, Dh].

    A query sees the `window` latest keys, itself included; None: all up to itself.
    """
    if kernel == "cudnn":
        before = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, local_window_size=before, implementation="cudnn"
        )
    return (_splash if kernel == "splash" else _plain)(query, key, value, window)


def _plain(query: Array, key: Array, value: Array, window: int | None) -> Array:
    """Matrix products and a softmax in float32; long rows in parts that skip what none may see.

    Heads come first in memory: XLA's batched products on CPU are then twice as fast as through
    jax.nn.dot_product_attention, forward and backward together.
    """
    batch, time, heads, head_dim = query.shape
    groups = key.shape[2]
    query = (query / head_dim**0.5).astype(query.dtype)
    query = query.reshape(batch, time, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = (x.transpose(0, 2, 1, 3) for x in (key, value))
    parts = min(max(time // PART, 1), 4)
    mixed = []
    for part in range(parts):
        first, end = time * part // parts, time * (part + 1) // parts
        oldest = 0 if window is None else max(0, first - window + 1)
        scores = jnp.einsum(
            "bghqd,bgkd->bghqk", query[..., first:end, :], key[..., oldest:end, :],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        behind = jnp.arange(first, end)[:, None] - jnp.arange(oldest, end)
        visible = (behind >= 0) & (behind < (window or time))
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        weights = weights.astype(value.dtype)
        mixed.append(jnp.einsum("bghqk,bgkd->bghqd", weights, value[..., oldest:end, :]))
    whole = jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4)
    return whole.reshape(batch, time, heads, head_dim)


def _splash(query: Array, key: Array, value: Array, window: int | None) -> Array:
    # Pallas takes a while to import, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    time, heads, head_dim = query.shape[1:]
    shape = (time, time)
    mask: splash.Mask = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (512, 256, TILE) if time % size == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
            block_q_dq=block, block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=jax.default_backend() != "tpu",  # so that the same code is tested anywhere
    )  # fmt: skip
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    mixed = jax.vmap(kernel)(
        heads_first(query / head_dim**0.5).astype(query.dtype), heads_first(key), heads_first(value)
    )
    return heads_first(mixed).astype(query.dtype)
