"""FLT_res: every layer of every later loop adds the previous loop's output to its stream."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("FLT_res", preset)
