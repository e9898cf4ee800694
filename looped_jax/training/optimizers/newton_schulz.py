"""Newton–Schulz: the nearest semi-orthogonal matrix, roughly, by matrix products alone.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # odd quintic that pushes singular values towards 1


def orthogonalize(matrices: Array, steps: int) -> Array:
    """Nearest semi-orthogonal matrices, roughly, of [N, short, long]; in their type.

    Singular values end in about 0.7 to 1.2, not at 1: enough for the update's direction.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / (jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
