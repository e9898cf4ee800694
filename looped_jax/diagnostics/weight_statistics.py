"""Statistics of weight matrices: RMS, spectral norm, effective rank, histogram of entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 50


@dataclass(frozen=True)
class MatrixStatistics:
    """Statistics of one weight.

    rms: of its entries; spectral_norm: largest singular value; effective_rank: exp of the entropy
    of the normalised singular values (Roy & Vetterli, 2007); counts, edges: the histogram of its
    entries; dimensions: 1 of a vector, 2 of a matrix or table
    """

    rms: float
    spectral_norm: float
    effective_rank: float
    counts: np.ndarray
    edges: np.ndarray
    dimensions: int


def compute(params: Mapping[str, Any]) -> dict[str, MatrixStatistics]:
    """MatrixStatistics of every weight of the flat dict, in its order."""
    return {name: _statistics(np.asarray(weight, np.float64)) for name, weight in params.items()}


def _statistics(weight: np.ndarray) -> MatrixStatistics:
    # Eigenvalues of the Gram matrix of the short side: an embedding has 150,000 rows, but only a
    # few hundred singular values.
    matrix = weight.reshape(len(weight), -1)  # vectors are matrices of one column
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(short @ short.T), 0))
    shares = values[values > 0] / max(values.sum(), 1e-300)
    counts, edges = np.histogram(weight, bins=BINS)
    return MatrixStatistics(
        rms=float(np.sqrt(np.mean(weight**2))),
        spectral_norm=float(values.max()),
        effective_rank=float(np.exp(-np.sum(shares * np.log(shares)))),
        counts=counts,
        edges=edges,
        dimensions=weight.ndim,
    )
