"""Which program computes attention: plain XLA, cuDNN's flash attention, or the TPU splash kernel.

All of them honour windows and grouped heads, and take queries from wherever they come. The fused
ones never hold the [T, T] weights; they want a device and shapes that they are written for. Where
one of these is missing, plain attention takes over: training says why, and refuses a kernel that it
was asked for by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ConfigError
from looped_jax.runtime.hardware import AttentionSupport, attention_support

Array = jax.Array
Attend = Callable[[Array, Array, Array, int | None], Array]
PART = 64  # queries of plain attention that are worth a part of their own
TILE = 128  # tokens that a TPU works on at once
BY_HEADS = P(None, None, "tensor")
# Matrix products in each kernel, as compiled programs name them. All but the first of the splash
# kernels compute the scores again.
PRODUCTS = {
    "splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4,
    "__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5,
}  # fmt: skip


class Choice(NamedTuple):
    """kernel: what computes attention; reason: why it is not the one that was wanted, or None."""

    kernel: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"attention: {self.kernel}" + (f", since {self.reason}" if self.reason else "")


def choose(
    config: ModelConfig, support: AttentionSupport, *, time: int, training: bool = False
) -> Choice:
    """The kernel for rows of `time` tokens: config.kernel, or with "auto" the device's own.

    What cannot be had is replaced by the device's own, and that by "xla". `training`: gradients are
    taken, of which a kernel may want more.
    """
    if config.kernel == "xla":
        return Choice("xla")
    reason = None
    for name in dict.fromkeys((config.kernel, support.kernel)):
        if name is None or name == "auto":
            continue
        problem = _problem(name, config, support, time, training)
        if problem is None:
            return Choice(name, reason)
        reason = reason or problem
    return Choice("xla", reason or support.missing)


def _problem(
    name: str, config: ModelConfig, support: AttentionSupport, time: int, training: bool
) -> str | None:
    """What stands in the way of a kernel, and the mend; None if nothing does."""
    act = [part for part in config.parts.on() if hasattr(PARTS[part], "attention_weights")]
    if training and act:
        return (
            f"model.parts.{act[0]} changes attention weights, which {name} never holds whole; "
            "leave it out"
        )
    if name == "cudnn":
        if support.kernel != "cudnn":
            return support.missing or f"cudnn needs an NVIDIA GPU, this is {support.platform}"
        if config.dtype != "bfloat16":
            return f"cudnn computes in bfloat16 alone; set model.dtype=bfloat16, not {config.dtype}"
        if config.head_dim % 8 or config.head_dim > 128:
            return (
                f"cudnn wants heads of a width up to 128 in steps of 8, not {config.head_dim}; "
                "change model.heads"
            )
        if training and time % 2:
            return f"cudnn trains on rows of an even length, not {time}; change model.seq_len"
    if name == "splash":
        if support.platform == "gpu":
            return "splash needs a TPU, this is gpu"
        if time % TILE:
            return (
                f"splash works on tiles of {TILE}: rows of {time} tokens do not divide; change "
                "model.seq_len"
            )
    return None


def check(config: ModelConfig, support: AttentionSupport) -> Choice:
    """The kernel to train with. Raises ConfigError when one was named that cannot be had."""
    choice = choose(config, support, time=config.seq_len, training=True)
    if config.kernel not in ("auto", choice.kernel):
        raise ConfigError(
            f"model.kernel={config.kernel}: {choice.reason}; or choose model.kernel=auto"
        )
    return choice


def fall_back(config: ModelConfig, mesh: Mesh) -> str | None:
    """Why programs on `mesh` do not attend with the kernel that one would expect, or None."""
    choice = choose(config, attention_support(mesh), time=config.seq_len)
    return str(choice) if choice.reason else None


def tile(config: ModelConfig, mesh: Mesh) -> int:
    """What row lengths should be multiples of, so that the best kernel takes them."""
    splash = choose(config, attention_support(mesh), time=TILE).kernel == "splash"
    return TILE if splash else 16


def for_mesh(config: ModelConfig, mesh: Mesh, *, training: bool = False) -> Attend:
    """Attention for programs on the devices of `mesh`, by the best kernel for each row length."""
    support = attention_support(mesh)
    interpret = support.platform != "tpu"  # so that the TPU's kernel can be tested anywhere
    fused: dict[str, Attend] = {
        "cudnn": _cudnn,
        "splash": functools.partial(_splash, interpret=interpret),
    }

    def attend(query: Array, key: Array, value: Array, window: int | None) -> Array:
        kernel = choose(config, support, time=query.shape[1], training=training).kernel
        if kernel == "xla":
            return plain(query, key, value, window)
        return _on_each_device(fused[kernel], query, key, value, window)

    return attend


def _on_each_device(
    fused: Attend, query: Array, key: Array, value: Array, window: int | None
) -> Array:
    """A fused kernel on this device's rows and heads, out of the compiler's hands.

    Programs are manual over the batch axes and leave `tensor` to the compiler. It cannot cut a
    kernel that it does not know, and refuses to try even where that axis has one device.
    """
    if window is not None and window >= query.shape[1]:
        window = None  # sees everything: a window that is longer than the row may be refused

    def local(query: Array, key: Array, value: Array) -> Array:
        return fused(query, key, value, window)

    if "tensor" not in jax.sharding.get_abstract_mesh().axis_names:
        return local(query, key, value)
    return jax.shard_map(
        local,
        in_specs=(BY_HEADS,) * 3,
        out_specs=BY_HEADS,
        axis_names={"tensor"},
        check_vma=False,
    )(query, key, value)


def _cudnn(query: Array, key: Array, value: Array, window: int | None) -> Array:
    before = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=before, implementation="cudnn"
    )


@functools.partial(jax.jit, static_argnames="window")  # traced once for all layers
def plain(query: Array, key: Array, value: Array, window: int | None) -> Array:
    """Causal softmax attention, [B, T, H, Dh] over [B, T, G, Dh] -> [B, T, H, Dh].

    A query sees the `window` latest keys, itself included; None: all up to itself. Matrix products
    and a softmax in float32; rows in up to four parts that skip what none may see. Products are of
    one axis on each side, heads first in memory, the queries that share a key's head in one axis:
    XLA's CPU programs are slower with others, by what benchmarks/README.md says.
    """
    batch, time, heads, head_dim = query.shape
    groups = key.shape[2]
    query = (query / head_dim**0.5).astype(query.dtype)
    query = query.reshape(batch, time, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = (x.transpose(0, 2, 1, 3) for x in (key, value))
    parts = min(max(time // PART, 1), 4)
    shared, mixed = heads // groups, []
    for part in range(parts):
        first, end = time * part // parts, time * (part + 1) // parts
        oldest = 0 if window is None else max(0, first - window + 1)
        queries = query[..., first:end, :].reshape(batch, groups, -1, head_dim)
        scores = _scores(queries, key[..., oldest:end, :])
        behind = jnp.tile(jnp.arange(first, end), shared)[:, None] - jnp.arange(oldest, end)
        visible = (behind >= 0) & (behind < (window or time))
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        weights = weights.astype(value.dtype)
        part_mixed = jnp.einsum("bgqk,bgkd->bgqd", weights, value[..., oldest:end, :])
        mixed.append(part_mixed.reshape(batch, groups, shared, end - first, head_dim))
    whole = jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4)
    return whole.reshape(batch, time, heads, head_dim)


@jax.custom_vjp
def _scores(query: Array, key: Array) -> Array:
    """Float32 [B, G, Q, S] of [B, G, Q, Dh] and [B, G, S, Dh]; gradients in their type.

    Left to JAX, the float32 gradient of the scores would make the backward products float32 too.
    """
    return jnp.einsum("bgqd,bgkd->bgqk", query, key, preferred_element_type=jnp.float32)


def _scores_forward(query: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scores(query, key), (query, key)


def _scores_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    query, key = saved
    gradient = gradient.astype(query.dtype)
    of_query = jnp.einsum("bgqk,bgkd->bgqd", gradient, key)
    return of_query, jnp.einsum("bgqk,bgqd->bgkd", gradient, query)


_scores.defvjp(_scores_forward, _scores_backward)


def pairs(time: int, window: int | None, *, tiled: bool) -> int:
    """Queries × keys that a fused kernel works on in a row of one head; `tiled`: splash's."""
    behind = time if window is None else min(window, time)
    if not tiled:
        return behind * (behind + 1) // 2 + (time - behind) * behind
    block = _block(time)
    return sum(
        block * block * (query // block - max(0, query - behind + 1) // block + 1)
        for query in range(0, time, block)
    )


def _block(time: int) -> int:
    """Queries, and keys, that splash takes at once."""
    return next(size for size in (512, 256, TILE) if time % size == 0)


def _splash(
    query: Array, key: Array, value: Array, window: int | None, *, interpret: bool
) -> Array:
    # Pallas takes a while to import, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    time, heads, head_dim = query.shape[1:]
    shape = (time, time)
    mask: splash.Mask = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    # Narrow heads fill a tile with zeros, as the hardware's registers would in any case.
    filled = [(0, 0)] * 3 + [(0, -head_dim % TILE)]
    scaled = (query / head_dim**0.5).astype(query.dtype)
    block = _block(time)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
            block_q_dq=block, block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    mixed = jax.vmap(kernel)(*(heads_first(jnp.pad(x, filled)) for x in (scaled, key, value)))
    return heads_first(mixed)[..., :head_dim].astype(query.dtype)
