"""Pointers in small graphs, where every loop should take one step more: tasks/pointers.py.

Presets: chain_end, chain_ends_16, hops, steps. They go with any rule: --config.model.variant=LT.
"""

from configs import base


def get_config(preset: str | None = None):
    return base.make("FLT", preset or "chain_end")
