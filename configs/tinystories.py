"""A small story teller of TinyStories, in one loop or in several."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("tinystories", preset)
