"""Whole models of the literature, by name: settings over a preset's. docs/models.md.

A family is a file with PRESETS: what it changes, at its paper's sizes as `huginn:paper`, over the
preset `paper`, and on a laptop as `huginn:tiny`, over `tiny`; under names of its own over the
defaults, where base_preset does not say otherwise. The first is meant where none is named. Its
docstring says what the paper's model has that this one has not. Every one of them is built of
settings that stand on a command line as well.
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from looped_jax.config.families import (
    huginn,
    middle,
    nanochat,
    nanogpt,
    ouro,
    parcae,
    tinystories,
    universal,
)

__all__ = ["FAMILIES", "base_preset", "find"]

FAMILIES: Mapping[str, Mapping[str, Callable[[ConfigDict], None]]] = {
    "huginn": huginn.PRESETS,
    "parcae": parcae.PRESETS,
    "ouro": ouro.PRESETS,
    "universal": universal.PRESETS,
    "middle": middle.PRESETS,
    "nanogpt": nanogpt.PRESETS,
    "nanochat": nanochat.PRESETS,
    "tinystories": tinystories.PRESETS,
}


# Families with presets of any size or run, too: what one changes, by its name, and how it is named.
NAMED = {
    "nanochat": (nanochat.of_size, "a size as d12 or d12x4"),
    "nanogpt": (nanogpt.of_run, "finetune or finetune@RUN"),
    "tinystories": (tinystories.of_size, "a size as d4 or d2x2"),
}


def find(family: str, preset: str) -> Callable[[ConfigDict], None] | None:
    """What a family's preset of that name changes; None where it has none."""
    named = NAMED[family][0](preset) if family in NAMED else None
    return FAMILIES[family].get(preset, named)


def base_preset(preset: str) -> str | None:
    """The preset that one of a family is over; None for the defaults."""
    over = {"paper": "paper", "tiny": "tiny", "laptop": "tiny", "laptop_loops": "tiny"}
    return over.get(preset)
