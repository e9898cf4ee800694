"""From states to logits and losses, a chunk of tokens at a time.

The paper's vocabulary has 152k entries: float32 logits of one 8 × 1024 batch are 5 GB, and K of
them would follow from scoring every loop. Here only one chunk of logits lives at once, forward and
backward, whatever the number of loops scored.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from looped_jax.config.resolved import ModelConfig
from looped_jax.model import transformer
from looped_jax.model.transformer import Params

Array = jax.Array
LOGITS_AT_ONCE = 2**26  # float32 logits in one chunk unless model.loss_chunk says otherwise


def logits(config: ModelConfig, params: Params, hidden: Array) -> Array:
    """Float32 logits [..., V] of states [..., D]."""
    return transformer.read_out(config, params, hidden)[..., : config.vocab_size]


def token_losses(config: ModelConfig, params: Params, hidden: Array, targets: Array) -> Array:
    """Cross-entropy in nats, float32 [N, B, T], of N loops' states [N, B, T, D].

    `targets` [B, T] are shared by all loops, [N, B, T] are each loop's own; where they are negative
    the loss is 0.
    """

    def nats(z: Array, y: Array) -> Array:
        picked = jnp.take_along_axis(z, jnp.maximum(y, 0)[:, None], axis=-1)[:, 0]
        return jnp.where(y < 0, 0.0, jax.nn.logsumexp(z, axis=-1) - picked)

    return _by_chunks(config, params, hidden, targets, nats)


def token_hits(config: ModelConfig, params: Params, hidden: Array, targets: Array) -> Array:
    """Whether the target is the likeliest token, bool [N, B, T]; arguments as in token_losses."""

    def hit(z: Array, y: Array) -> Array:
        return z.argmax(axis=-1) == y

    return _by_chunks(config, params, hidden, targets, hit)


def _by_chunks(
    config: ModelConfig,
    params: Params,
    hidden: Array,
    targets: Array,
    measure: Callable[[Array, Array], Array],
) -> Array:
    """`measure` of logits [C, Vp] and targets [C], for all tokens, C of them at a time."""
    loops, batch, time, width = hidden.shape
    tokens = batch * time
    chunk = min(config.loss_chunk or max(1, LOGITS_AT_ONCE // config.padded_vocab), tokens)
    chunks = -(-tokens // chunk)
    fill = chunks * chunk - tokens
    h = jnp.pad(hidden.reshape(loops, tokens, width), ((0, 0), (0, fill), (0, 0)))
    h = h.reshape(loops * chunks, chunk, width)
    if targets.ndim == 2:
        y = jnp.pad(targets.reshape(tokens), (0, fill), constant_values=-1)
        y = jnp.tile(y.reshape(chunks, chunk), (loops, 1))
    else:
        y = jnp.pad(targets.reshape(loops, tokens), ((0, 0), (0, fill)), constant_values=-1)
        y = y.reshape(loops * chunks, chunk)

    def one(args: tuple[Array, Array]) -> Array:
        h, y = args
        with jax.named_scope("head"):
            z = transformer.read_out(config, params, h)
            z = jnp.where(jnp.arange(z.shape[-1]) < config.vocab_size, z, -jnp.inf)
        with jax.named_scope("loss"):
            return measure(z, y)

    if loops * chunks == 1:  # everything fits: nothing to recompute
        measured = one((h[0], y[0]))[None]
    else:
        measured = jax.lax.map(jax.checkpoint(one, prevent_cse=False), (h, y))
    return measured.reshape(loops, chunks * chunk)[:, :tokens].reshape(loops, batch, time)
