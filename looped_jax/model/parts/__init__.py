"""The parts that come with this package, one technique in each file; see model/part.py."""

from looped_jax.model.parts import kv_shift

__all__ = ["kv_shift"]
