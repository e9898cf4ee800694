"""Ouro: all layers four times, scored after every loop, with a gate that says when to leave."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("ouro", preset)
