"""The loops: one scan over the same body. Nothing else runs the model's layers K times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from looped_jax.model.linear import PRODUCT


def scan_loops(
    body: Callable[[Any, tuple[jax.Array, Any]], tuple[Any, Any]],
    carry: Any,
    start: int,
    stop: int,
    *,
    inputs: Any = None,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Loops `start` to `stop` − 1: body(carry, (loop index, inputs of the loop)) -> (carry, kept).

    Returns the last carry, and what was kept, stacked over loops. `inputs` is a pytree whose leaves
    have a first axis of loops, or None. `remat` names what the backward pass keeps of each loop,
    from least to most memory:

    "loop": its start alone. "offload": its matrix products too, in the host's memory. "dots": the
    same on the device. "none": everything, and nothing is recomputed.
    """
    return jax.lax.scan(_rematerialised(body, remat), carry, (jnp.arange(start, stop), inputs))


def _rematerialised(body: Callable, remat: str) -> Callable:
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = {
        "loop": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[PRODUCT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        "dots": policies.save_only_these_names(PRODUCT),
    }[remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=False)  # a scan prevents it already
