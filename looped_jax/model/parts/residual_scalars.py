"""Scalars of every layer on the stream and on the embedding that is added to it again.

x ← r_i · x + z_i · x0 before layer i, with x0 = norm(e): the layer's own r_i and z_i, shared by all
visits of the layer. r acts as r^K on what passes K loops, so that anything but 1 wants loops that
norm their start, as all rules do without `carried_scale`: 1.15, …, 1.05 over twelve layers, as in
nanochat of July 2026, multiply the stream by 3.1 in each loop.

`each_loop` gives every loop its own r and z, which ties the weights to K: beyond the trained K
those of the last loop are used. `x0` = first_visit adds x0 in the first loop alone.

Source: nanochat (Karpathy, 2025) after Jordan et al., modded-nanogpt, 2024: `resid_lambdas` and
`x0_lambdas`, 1 and 0.1 in all layers, later 1.15 to 1.05 and 0.2 to 0.05.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import one_of, setting
from looped_jax.config.registry import PARTS, WEIGHT_GROUPS
from looped_jax.config.resolved import ModelConfig
from looped_jax.model.parts.base import Here, Part, PartSettings, of_loop
from looped_jax.model.weight_groups import WeightGroup
from looped_jax.model.weights import weight

Array = jax.Array


@dataclass(frozen=True)
class ResidualScalarsSettings(PartSettings):
    """Of the scalars; those of layers between the first and the last start on a line."""

    residual_first: float = setting(1.0, "r of the first layer, at the start")
    residual_last: float = setting(1.0, "r of the last layer")
    input_first: float = setting(0.1, "z of the first layer, at the start")
    input_last: float = setting(0.1, "z of the last layer")
    x0: str = one_of(("every_visit", "first_visit"), "every_visit", "loops in which x0 is added")
    each_loop: bool = setting(False, "whether every loop has scalars of its own")


@WEIGHT_GROUPS.register("residual_scalar")
class ResidualScalarGroup(WeightGroup):
    """Scalars r on the stream."""

    logged = True


@WEIGHT_GROUPS.register("input_scalar")
class InputScalarGroup(WeightGroup):
    """Scalars z on the embedding."""

    logged = True


@PARTS.register("residual_scalars")
class ResidualScalars(Part):
    """Site: layer_start."""

    Settings = ResidualScalarsSettings
    each_layer = False
    starts_as_identity = False

    def __init__(
        self,
        settings: ResidualScalarsSettings,
        config: ModelConfig,
        layer: int | None,
        *,
        rngs: nnx.Rngs,
    ):
        self._first_alone = settings.x0 == "first_visit"
        loops = config.loops if settings.each_loop else 1

        def scalars(first: float, last: float, group: str) -> nnx.Param:
            line = jnp.linspace(first, last, config.layers)
            return weight(jnp.tile(line, (loops, 1)), None, None, group=group)

        self.residual = scalars(settings.residual_first, settings.residual_last, "residual_scalar")
        self.input = scalars(settings.input_first, settings.input_last, "input_scalar")

    def layer_start(self, x: Array, here: Here) -> Array:
        r, z = (of_loop(w, here)[..., here.layer, None] for w in (self.residual, self.input))
        if self._first_alone:
            z = jnp.where((here.loop == 0)[..., None], z, 0)
        return (r * x + z * here.x0).astype(x.dtype)  # in bfloat16 r could not move by 0.005 from 1
