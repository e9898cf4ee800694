"""How documents become rows, each way in a file; see data/packing/base.py."""

from looped_jax.data.packing import best_fit, stream
from looped_jax.data.packing.base import Packing, of

__all__ = ["Packing", "best_fit", "of", "stream"]
