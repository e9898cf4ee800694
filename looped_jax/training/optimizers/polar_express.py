"""Polar Express: the nearest semi-orthogonal matrix, each iteration with the best polynomial.

Source: Amsel et al., "The Polar Express: Optimal matrix sign methods and their application to the
Muon algorithm", 2025 (arXiv 2505.16932); the coefficients are those of nanochat.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
# (a, b, c) of x ← a x + b x³ + c x⁵, one line for each iteration; later ones repeat the last.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(matrices: Array, steps: int, *, safety: float) -> Array:
    """Nearest semi-orthogonal matrices, nearly, of [N, short, long]; in their type.

    safety: beyond 1, so that rounding leaves no singular value above 1, where it would grow
    """
    norm = jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True)
    x = matrices / (safety * norm + 1e-6)
    for step in range(steps):
        a, b, c = COEFFICIENTS[min(step, len(COEFFICIENTS) - 1)]
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
