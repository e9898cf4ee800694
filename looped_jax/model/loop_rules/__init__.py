"""The loop rules that come with this package: the paper's five, and injections, each in a file.

Of injections, add is `LT_i` and none is `LT`, which are among the five.
"""

from looped_jax.model.loop_rules import fully_looped  # isort: skip  (its names come first)
from looped_jax.model.loop_rules import diagonal, gate, linear
from looped_jax.model.loop_rules.base import LoopRule

__all__ = ["LoopRule", "diagonal", "fully_looped", "gate", "linear"]
