"""How tokens become vectors, and states logits: one way in each file; see separate.py."""

from looped_jax.model.embeddings import factorised, tied
from looped_jax.model.embeddings.separate import Separate

__all__ = ["Separate", "factorised", "tied"]
