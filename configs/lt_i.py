"""LT_i: the embedding is added to the state at the start of every loop."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("LT_i", preset)
