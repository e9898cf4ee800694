"""nanochat: its model and recipe at any depth, in one loop or in several."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("nanochat", preset)
