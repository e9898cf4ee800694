"""nanoGPT's models, of Shakespeare and of OpenWebText."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("nanogpt", preset)
