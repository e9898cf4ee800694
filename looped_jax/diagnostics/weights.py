"""What the matrices look like: size, spectrum, spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 61


@dataclass(frozen=True)
class Matrix:
    """One weight. rms of its entries; spectral: largest singular value; rank: effective rank,
    exp of the entropy of the normalised singular values (Roy & Vetterli, 2007); counts, edges:
    histogram of the entries."""

    rms: float
    spectral: float
    rank: float
    counts: np.ndarray
    edges: np.ndarray


def inspect(params: Mapping[str, Any]) -> dict[str, Matrix]:
    """A Matrix for every weight of the flat dict, in its order."""
    return {name: _matrix(np.asarray(weight, np.float64)) for name, weight in params.items()}


def _matrix(weight: np.ndarray) -> Matrix:
    # the Gram matrix of the short side: a vocabulary's table has 150,000 rows, but a few hundred
    # singular values
    short = weight if weight.shape[0] <= weight.shape[1] else weight.T
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(short @ short.T), 0))
    shares = values[values > 0] / max(values.sum(), 1e-300)
    counts, edges = np.histogram(weight, bins=BINS)
    return Matrix(
        rms=float(np.sqrt(np.mean(weight**2))),
        spectral=float(values.max()),
        rank=float(np.exp(-np.sum(shares * np.log(shares)))),
        counts=counts,
        edges=edges,
    )
