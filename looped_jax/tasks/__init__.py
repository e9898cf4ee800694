"""Tasks: where the rows that a model is trained on come from, and how it is judged."""

from looped_jax.tasks import (
    addition,
    brevo,
    depo,
    mano,
    p_hop,
    pointers,
    text,
    word_problem,
)

__all__ = ["addition", "brevo", "depo", "mano", "p_hop", "pointers", "text", "word_problem"]
