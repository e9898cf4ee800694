"""From states to logits and losses, a chunk of tokens at a time.

The paper's vocabulary has 152k entries: float32 logits of one 8 × 1024 batch are 5 GB, and K of
them would follow from scoring every loop. Here only one chunk of logits lives at once, forward and
backward, whatever the number of loops scored. Training knows beforehand what each loss will count
for, and takes its gradients while the logits are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from looped_jax.config.resolved import ModelConfig
from looped_jax.model import transformer
from looped_jax.model.transformer import Params

Array = jax.Array
LOGITS_AT_ONCE = 5 * 2**25  # about, float32 in one chunk, unless model.loss_chunk says otherwise
SAFE_CAP = 30.0  # e^-2c is then far from the least float32
TILE = 128  # tokens that a TPU's registers hold side by side: chunks are multiples of it


def logits(config: ModelConfig, params: Params, hidden: Array) -> Array:
    """Float32 logits [..., V] of states [..., D]."""
    return transformer.read_out(config, params, hidden)[..., : config.vocab_size]


def token_losses(config: ModelConfig, params: Params, hidden: Array, targets: Array) -> Array:
    """Cross-entropy in nats, float32 [N, B, T], of N loops' states [N, B, T, D].

    `targets` [B, T] are shared by all loops, [N, B, T] are each loop's own; where they are negative
    the loss is 0.
    """

    def nats(z: Array, y: Array) -> Array:
        return _nats(z, y, _logsum(config, z))

    return _by_chunks(config, params, hidden, targets, nats)


def weighted_losses(
    config: ModelConfig, params: Params, hidden: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    """Σ weights · sums, and the sums [N] of token_losses over tokens, which have no gradients.

    `weights` float32 [N] are known before the losses and have no gradients either. Asked for
    gradients, one pass over the chunks makes them beside the losses: logits are computed once,
    where the backward pass of token_losses would compute them again.
    """
    names = transformer.read_out_weights(config)
    read = {name: params[name] for name in names}
    others = {name: weight for name, weight in params.items() if name not in names}
    total, sums = _weighted(config, read, others, hidden, targets, weights)
    return total, jax.lax.stop_gradient(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(
    config: ModelConfig,
    read: Params,
    others: Params,
    hidden: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, Array]:
    sums = token_losses(config, others | read, hidden, targets).sum((1, 2))
    return (weights * sums).sum(), sums


def _weighted_forward(
    config: ModelConfig,
    read: Params,
    others: Params,
    hidden: Array,
    targets: Array,
    weights: Array,
) -> tuple[tuple[Array, Array], tuple[Params, Array]]:
    h, y = _chunks(config, hidden, targets)
    each = len(h) // len(hidden)  # chunks of one loop

    def one(h: Array, y: Array, weight: Array) -> tuple[Params, Array, Array]:
        """Gradients by what is read and by states, and the losses, of one chunk."""
        z, pull = jax.vjp(lambda read, h: _masked_logits(config, others | read, h), read, h)
        with jax.named_scope("loss"):
            logsum = _logsum(config, z)
            target = jnp.arange(z.shape[-1]) == y[:, None]
            of_z = jnp.exp(z - logsum[:, None]) - target
            of_z = jnp.where(y < 0, 0.0, weight)[:, None] * of_z
            measured = _nats(z, y, logsum)
        return *pull(of_z), measured

    def add(of_read: Params, chunk: tuple[Array, Array, Array]) -> tuple[Params, Any]:
        of_chunk, of_h, measured = one(*chunk)
        return jax.tree.map(jnp.add, of_read, of_chunk), (of_h, measured)

    parts = (h, y, jnp.repeat(weights, each))
    if len(h) == 1:
        of_read, of_h, measured = one(*(part[0] for part in parts))
        of_h, measured = of_h[None], measured[None]
    else:
        of_read, (of_h, measured) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, read), parts)
    sums = measured.reshape(len(hidden), -1).sum(1)
    return ((weights * sums).sum(), sums), (of_read, _whole(of_h, hidden))


def _weighted_backward(
    config: ModelConfig, saved: tuple[Params, Array], gradients: tuple[Array, Array]
) -> tuple[Params, None, Array, None, None]:
    of_read, of_hidden = saved
    by = gradients[0]
    return (
        {name: by * gradient for name, gradient in of_read.items()},
        None,
        (by * of_hidden).astype(of_hidden.dtype),
        None,
        None,
    )


_weighted.defvjp(_weighted_forward, _weighted_backward)


def token_hits(config: ModelConfig, params: Params, hidden: Array, targets: Array) -> Array:
    """Whether the target is the likeliest token, bool [N, B, T]; arguments as in token_losses."""

    def hit(z: Array, y: Array) -> Array:
        return z.argmax(axis=-1) == y

    return _by_chunks(config, params, hidden, targets, hit)


def chunk_size(config: ModelConfig, tokens: int) -> int:
    """Tokens whose logits live at once, of `tokens` of a loop: chunks alike in size."""
    if config.loss_chunk:
        return min(config.loss_chunk, tokens)
    count = -(-tokens // max(1, LOGITS_AT_ONCE // config.padded_vocab))
    return tokens if count == 1 else min(tokens, -(-tokens // (count * TILE)) * TILE)


def _chunks(config: ModelConfig, hidden: Array, targets: Array) -> tuple[Array, Array]:
    """States [N, B, T, D] as [N · chunks, C, D], and targets as [N · chunks, C], filled with −1."""
    loops, batch, time, width = hidden.shape
    tokens = batch * time
    chunk = chunk_size(config, tokens)
    count = -(-tokens // chunk)
    fill = count * chunk - tokens
    h = jnp.pad(hidden.reshape(loops, tokens, width), ((0, 0), (0, fill), (0, 0)))
    h = h.reshape(loops * count, chunk, width)
    if targets.ndim == 2:
        y = jnp.pad(targets.reshape(tokens), (0, fill), constant_values=-1)
        y = jnp.tile(y.reshape(count, chunk), (loops, 1))
    else:
        y = jnp.pad(targets.reshape(loops, tokens), ((0, 0), (0, fill)), constant_values=-1)
        y = y.reshape(loops * count, chunk)
    return h, y


def _whole(x: Array, hidden: Array) -> Array:
    """Chunks [N · chunks, C, …] as they were in hidden [N, B, T, …]."""
    loops, batch, time = hidden.shape[:3]
    joined = x.reshape(loops, -1, *x.shape[2:])[:, : batch * time]
    return joined.reshape(loops, batch, time, *x.shape[2:])


def _by_chunks(
    config: ModelConfig,
    params: Params,
    hidden: Array,
    targets: Array,
    measure: Callable[[Array, Array], Array],
) -> Array:
    """`measure` of logits [C, Vp] and targets [C], for all tokens, C of them at a time."""
    h, y = _chunks(config, hidden, targets)

    def one(args: tuple[Array, Array]) -> Array:
        return _measured(config, params, *args, measure)

    if len(h) == 1:  # everything fits: nothing to recompute
        return _whole(one((h[0], y[0]))[None], hidden)
    return _whole(jax.lax.map(jax.checkpoint(one, prevent_cse=False), (h, y)), hidden)


def _measured(
    config: ModelConfig,
    params: Params,
    h: Array,
    y: Array,
    measure: Callable[[Array, Array], Array],
) -> Array:
    """`measure` [C] of the logits of states [C, D] and targets [C]."""
    z = _masked_logits(config, params, h)
    with jax.named_scope("loss"):
        return measure(z, y)


def _masked_logits(config: ModelConfig, params: Params, h: Array) -> Array:
    """Float32 logits [C, Vp] of states [C, D], −∞ for entries that only fill the vocabulary up."""
    with jax.named_scope("head"):
        z = transformer.read_out(config, params, h)
        return jnp.where(jnp.arange(z.shape[-1]) < config.vocab_size, z, -jnp.inf)


def _logsum(config: ModelConfig, z: Array) -> Array:
    """log Σ exp z of logits [C, Vp].

    Where they have a bound it stands for their maximum, which no pass then has to find first.
    """
    if not 0 < config.soft_cap <= SAFE_CAP:
        return jax.nn.logsumexp(z, axis=-1)
    return config.soft_cap + jnp.log(jnp.exp(z - config.soft_cap).sum(-1))


def _nats(z: Array, y: Array, logsum: Array) -> Array:
    picked = jnp.take_along_axis(z, jnp.maximum(y, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(y < 0, 0.0, logsum - picked)
