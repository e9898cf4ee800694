"""Mano: arithmetic modulo 23 in the head. Source: Allen-Zhu, "Physics of language models" 4.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from looped_jax.config.options import at_least
from looped_jax.config.registry import TASKS
from looped_jax.tasks.generated import GeneratedTask, Row

MODULUS = 23
OPERATORS = "+-*"


@dataclass(frozen=True)
class ManoSettings:
    operators: int = at_least(1, 10, "L, of an expression to train on, at most")
    test_operators: int = at_least(1, 10, "of one to test with, at most")


@TASKS.register("mano")
class Mano(GeneratedTask):
    """The value of an expression modulo 23, at once.

    Tokens: 0 … 22, the operators + − *, =, and one for each number of operators. A row is the
    number ℓ of operators, an expression in prefix form, =; owed at = alone: its value. An
    expression of ℓ operators is a random one, then expressions of i and of ℓ − 1 − i, i uniform;
    one of none is a uniform number. ℓ is uniform from 1; the source tests with the largest alone.
    Chance is 1 / 23.
    """

    Settings = ManoSettings
    difficulty = "operators"

    def sizes(self) -> tuple[int, int]:
        most = max(self.settings.operators, self.settings.test_operators)
        return MODULUS + len(OPERATORS) + 1 + most, 2 * most + 3

    def row(self, random: np.random.Generator, *, test: bool, loops: Sequence[int] = ()) -> Row:
        s = self.settings
        count = int(random.integers(1, (s.test_operators if test else s.operators) + 1))
        told, value = expression(random, count)
        equals = MODULUS + len(OPERATORS)
        tokens = np.array([equals + count, *told, equals, value])
        answers = np.full(len(tokens), -1)
        answers[-1] = 0
        return Row.of_tokens(tokens, answers, np.where(answers < 0, -1, count), length=self.length)

    def word(self, token: int) -> str:
        operator = token - MODULUS
        if operator < 0:
            return str(token)
        ends = f"{OPERATORS}="
        return ends[operator] if operator < len(ends) else f"#{operator - len(OPERATORS)}"


def expression(random: np.random.Generator, operators: int) -> tuple[list[int], int]:
    """Tokens of a random expression, and its value."""
    if operators == 0:
        leaf = int(random.integers(MODULUS))
        return [leaf], leaf
    operator, within = int(random.integers(len(OPERATORS))), int(random.integers(operators))
    first, a = expression(random, within)
    second, b = expression(random, operators - 1 - within)
    return [MODULUS + operator, *first, *second], (a + b, a - b, a * b)[operator] % MODULUS
