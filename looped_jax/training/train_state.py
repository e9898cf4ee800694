"""What an optimizer step takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from looped_jax.model.transformer import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """A pytree. On disk its leaves have the names of their paths, as params/embed.

    params: float32 weights by name, see model/transformer.py
    optimizer: the state of the optax transformation
    step: [] int32, optimizer steps taken
    """

    params: Params
    optimizer: Any
    step: jax.Array
