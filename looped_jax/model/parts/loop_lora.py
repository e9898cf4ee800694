"""A low-rank change of the layers' matrices for every loop: shared weights, relaxed.

y = x W + (x A_t) B_t with A_t [in, r] and B_t [r, out] of loop t, B_t zero at the start. Beyond the
trained K the last loop's are used. Source: Bae et al., "Relaxed Recursive Transformers", 2024
(arXiv 2410.20672), trained from scratch; there A_t and B_t may also start from an unlooped model.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import at_least, setting
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ConfigError
from looped_jax.model.parts.base import Here, Part, PartSettings, times_of_loop
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class LoopLoRASettings(PartSettings):
    """Of the low-rank changes of every loop."""

    rank: int = at_least(1, 8, "r of each")
    matrices: tuple[str, ...] = setting(
        ("query", "key", "value", "out", "up", "down"),
        "of a layer, which they change; as \"('query','key')\"",
    )


@PARTS.register("loop_lora")
class LoopLoRA(Part):
    """Site: product."""

    Settings = LoopLoRASettings

    def __init__(
        self, settings: LoopLoRASettings, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs
    ):
        matrices = _matrices(config)
        if unknown := [name for name in settings.matrices if name not in matrices]:
            raise ConfigError(
                f"model.parts.loop_lora.matrices={settings.matrices}: a layer with "
                f"model.attention={config.attention} has no matrix {unknown[0]!r}; choose of "
                f"{', '.join(matrices)}, as \"('query','key')\""
            )
        a, b = {}, {}
        for name in settings.matrices:
            (fan_in, axis_in), (fan_out, axis_out) = matrices[name]
            shape, bound = (config.loops, fan_in, settings.rank), (3 / fan_in) ** 0.5
            start = jax.random.uniform(rngs.parts(), shape, minval=-bound, maxval=bound)
            a[name] = weight(start, None, axis_in, None, group="low_rank")
            zero = jnp.zeros((config.loops, settings.rank, fan_out))
            b[name] = weight(zero, None, None, axis_out, group="low_rank")
        self.a, self.b = nnx.Dict(a), nnx.Dict(b)

    def product(self, y: Array, here: Here) -> Array:
        name = here.matrix
        if name not in self.a:
            return y
        reduced = times_of_loop(here.source, self.a[name], here)
        return y + times_of_loop(reduced, self.b[name], here)


def _matrices(config: ModelConfig) -> dict[str, tuple[tuple[int, str], tuple[int, str]]]:
    """Size and axis of inputs and outputs of the matrices of a layer, by name; see block.py."""
    width, hidden = (config.width, "embed"), (4 * config.width, "mlp")
    heads = (config.attention_width, "heads")
    found = {"query": (width, heads), "out": (heads, width), "up": (width, hidden),
             "down": (hidden, width)}  # fmt: skip
    source = width
    if config.attention == "mla":
        source = (config.latent_rank, "latent")
        found["latent"] = (width, source)
    of_keys = (config.kv_heads * config.head_dim, "heads")
    return found | {"key": (source, of_keys), "value": (source, of_keys)}
