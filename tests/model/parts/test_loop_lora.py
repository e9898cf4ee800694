"""Against a plain model whose matrices have every loop's change added to them."""

import dataclasses

import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.errors import ConfigError
from looped_jax.model import transformer
from looped_jax.model.parts.loop_lora import LoopLoRASettings
from tests.model.parts.plain import next_state
from tests.model.test_part import TOKENS, loud, with_parts


@pytest.mark.parametrize("attention", ["full", "mla"])
def test_every_loop_has_matrices_of_its_own_and_later_ones_the_last(attention):
    plain = with_parts((), layers=1, attention=attention, latent_rank=8).model
    names = ("query", "key", "value", "out", "up", "down")
    names += ("latent",) if attention == "mla" else ()
    parts = Parts({"loop_lora": LoopLoRASettings(on=True, rank=2, matrices=names)})
    config = dataclasses.replace(plain, parts=parts)
    params = loud(config)
    ours = transformer.forward(config, params, TOKENS, loops=4, return_loops=(0, 1, 2, 3)).hidden
    state = None
    for loop in range(4):
        merged = dict(params)
        for name in names:
            a, b = (
                params[f"blocks.0.parts.loop_lora.{factor}.{name}"][min(loop, 2)]
                for factor in ("a", "b")
            )
            room = "mlp" if name in ("up", "down") else "attention"
            merged[f"blocks.0.{room}.{name}"] = params[f"blocks.0.{room}.{name}"] + a @ b
        state = next_state(plain, merged, state, loop)
        np.testing.assert_allclose(ours[loop], state, atol=1e-4)


def test_a_matrix_that_no_layer_has_is_named():
    config = with_parts(()).model
    parts = Parts({"loop_lora": LoopLoRASettings(on=True, matrices=("query", "latent"))})
    with pytest.raises(ConfigError, match="attention=full has no matrix 'latent'; choose of query"):
        transformer.weights(dataclasses.replace(config, parts=parts))
