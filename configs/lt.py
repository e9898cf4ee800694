"""LT, the plain looped transformer: a loop's output is the next loop's input."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("LT", preset)
