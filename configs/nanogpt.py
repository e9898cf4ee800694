"""nanoGPT's models of tiny Shakespeare, character by character."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("nanogpt", preset)
