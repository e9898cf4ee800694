"""The loops: a scan over the same body, or a traced number of them with a scan at their end.

Nothing else runs the model's layers more than once.
"""

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
    same on the device. "none": everything, and nothing is recomputed. "auto" is as "loop" until
    one of them has been chosen: training/recomputation.py.
    """
    return jax.lax.scan(rematerialised(body, remat), carry, (jnp.arange(start, stop), inputs))


def counted_loops(
    body: Callable[[Any, tuple[jax.Array, Any]], tuple[Any, Any]],
    frozen: Callable[[Any, jax.Array], Any],
    carry: Any,
    total: jax.Array,
    backward: jax.Array,
    *,
    longest: int,
    inputs: Any = None,
    remat: str = "none",
) -> tuple[Any, Any]:
    """`total` loops, the last `backward` of them with gradients: traced, so one program for all.

    Loops are named by how many are `left`, the last by 1: body(carry, (left, inputs of the loop))
    as in scan_loops, frozen(carry, left) -> carry. The scan has room for `longest` loops; what
    `backward` leaves of them is skipped, and kept as zeros. A loop of a traced length has no
    reverse mode, so `frozen` must close over nothing that gradients are asked for.
    """
    carry = jax.lax.fori_loop(
        0, total - backward, lambda n, carry: frozen(carry, total - n), jax.lax.stop_gradient(carry)
    )
    left = jnp.arange(longest, 0, -1)
    kept = jax.eval_shape(body, carry, jax.tree.map(lambda leaf: leaf[0], (left, inputs)))[1]

    def unless_skipped(carry: Any, of_loop: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)
        return jax.lax.cond(
            of_loop[0] <= backward, body, lambda carry, _: (carry, nothing), carry, of_loop
        )

    return jax.lax.scan(rematerialised(unless_skipped, remat), carry, (left, inputs))


def rematerialised(body: Callable, remat: str, *, scanned: bool = True) -> Callable:
    """`body`, of which the backward pass finds what `remat` keeps, and computes the rest again.

    `scanned`: it is the body of a scan, where no compiler can take the two for one; elsewhere they
    are kept apart.
    """
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
        "auto": policies.nothing_saveable,
    }[remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=not scanned)
