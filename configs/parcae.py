"""Parcae: a third of the layers looped, by a linear system that cannot grow, a count a sequence."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("parcae", preset)
