"""What the tests of parts compare with: the plain model, loop by loop, and its MLP written out."""

import numpy as np

from looped_jax.model import transformer
from tests.model.test_part import TOKENS


def params_of(config, params):
    """The weights that a model without the parts has."""
    return {name: params[name] for name in transformer.weights(config)}


def next_state(config, params, h, done):
    """The state [B, T, D] that one more loop leaves, after `done` loops have left h."""
    return transformer.forward(
        config, params_of(config, params), TOKENS, loops=done + 1, start=h, done=done
    ).hidden[0]


def norm(x):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.finfo(np.float32).eps)


def mlp(params, x, layer=0):
    """What a layer's MLP says of a stream."""
    up, down = (params[f"blocks.{layer}.mlp.{name}"] for name in ("up", "down"))
    return np.square(np.maximum(norm(x) @ up, 0)) @ down
