"""A small MLP behind each branch, of every loop's own: shared layers that each loop adapts.

f ← f + up_t(relu(down_t(f))) of what a branch adds, with down_t [D, r] and up_t [r, D] of loop t,
up_t zero at the start. Beyond the trained K the last loop's are used. Source: Houlsby et al.,
"Parameter-Efficient Transfer Learning for NLP", 2019 (arXiv 1902.00751), there of every task.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import at_least
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.parts.base import Here, Part, PartSettings, times_of_loop
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class LoopAdaptersSettings(PartSettings):
    """Of the adapters of every loop and branch."""

    rank: int = at_least(1, 16, "r, hidden width of each")


class Adapter(nnx.Module):
    """One for every loop, behind one branch."""

    def __init__(self, config: ModelConfig, rank: int, *, rngs: nnx.Rngs):
        shape, bound = (config.loops, config.width, rank), (3 / config.width) ** 0.5
        down = jax.random.uniform(rngs.parts(), shape, minval=-bound, maxval=bound)
        self.down = weight(down, None, "embed", None, group="low_rank")
        up = jnp.zeros((config.loops, rank, config.width))
        self.up = weight(up, None, None, "embed", group="low_rank")

    def __call__(self, x: Array, here: Here) -> Array:
        hidden = jax.nn.relu(times_of_loop(x, self.down, here))
        return x + times_of_loop(hidden, self.up, here)


@PARTS.register("loop_adapters")
class LoopAdapters(Part):
    """Sites: attention_output, mlp_output."""

    Settings = LoopAdaptersSettings

    def __init__(
        self,
        settings: LoopAdaptersSettings,
        config: ModelConfig,
        layer: int | None,
        *,
        rngs: nnx.Rngs,
    ):
        self.of_attention = Adapter(config, settings.rank, rngs=rngs)
        self.of_mlp = Adapter(config, settings.rank, rngs=rngs)

    def attention_output(self, x: Array, here: Here) -> Array:
        return self.of_attention(x, here)

    def mlp_output(self, x: Array, here: Here) -> Array:
        return self.of_mlp(x, here)
