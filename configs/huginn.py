"""Huginn: four layers, looped a random number of times, between two before and two after them."""

from configs import base


def get_config(preset: str | None = None):
    return base.make("huginn", preset)
