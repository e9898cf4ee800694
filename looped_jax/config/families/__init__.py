"""Whole looped models of the literature, by name: settings over a preset's. docs/models.md.

A family is a file with PRESETS: what it changes under the preset of that name, at its paper's sizes
as `huginn:paper` and on a laptop as `huginn:tiny`, or over the defaults under names of its own. The
first is meant where none is named. Its docstring says what the paper's model has
that this one has not. Every one of them is built of settings that stand on a command line as well.
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from looped_jax.config.families import huginn, middle, nanogpt, ouro, parcae, universal

__all__ = ["FAMILIES"]

FAMILIES: Mapping[str, Mapping[str, Callable[[ConfigDict], None]]] = {
    "huginn": huginn.PRESETS,
    "parcae": parcae.PRESETS,
    "ouro": ouro.PRESETS,
    "universal": universal.PRESETS,
    "middle": middle.PRESETS,
    "nanogpt": nanogpt.PRESETS,
}
