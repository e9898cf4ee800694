"""Universal Transformer: one layer, told where a token stands and which loop it is in."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("universal", preset)
