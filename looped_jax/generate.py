"""Text from a model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from looped_jax.config import ModelConfig
from looped_jax.model import loss, transformer
from looped_jax.model.transformer import Params


def greedy(
    config: ModelConfig, params: Params, prompts: list[list[int]], *, tokens: int
) -> list[list[int]]:
    """The likeliest next token, `tokens` times, after each prompt of token ids.

    Every token costs one full forward pass over a fixed length, so there is one compile.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    buffer = np.zeros((len(prompts), lengths.max() + tokens), np.int32)
    for row, prompt in zip(buffer, prompts, strict=True):
        row[: len(prompt)] = prompt  # what lies to the right is masked by causality
    for done in range(tokens):
        chosen = np.asarray(_next(config, params, buffer, lengths + done - 1))
        buffer[np.arange(len(prompts)), lengths + done] = chosen
    return [row[n : n + tokens].tolist() for row, n in zip(buffer, lengths, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _next(config: ModelConfig, params: Params, buffer: jax.Array, last: jax.Array) -> jax.Array:
    states = transformer.forward(config, params, buffer)
    hidden = states.hidden[-1][jnp.arange(buffer.shape[0]), last]
    return loss.logits(config, params["head"].astype(config.dtype), hidden).argmax(-1)
