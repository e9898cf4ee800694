"""FLT, fully looped: every layer of every later loop takes its queries from the previous loop."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("FLT", preset)
