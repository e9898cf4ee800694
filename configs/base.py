"""What every configuration starts from: a loop rule and a preset."""

from looped_jax.config.presets import make

__all__ = ["make"]
