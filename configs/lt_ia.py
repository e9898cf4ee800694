"""LT_ia: only the first layer of a later loop takes its queries from the previous loop."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("LT_ia", preset)
