"""Middle: two layers in the middle run twice, from 40% of training on."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("middle", preset)
