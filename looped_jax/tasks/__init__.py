"""Tasks: where the rows that a model is trained on come from, and how it is judged."""

from looped_jax.tasks import pointers, text

__all__ = ["pointers", "text"]
