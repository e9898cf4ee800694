"""What every configuration starts from: a loop rule and a preset of looped_jax/presets.py."""

from looped_jax.presets import make

__all__ = ["make"]
