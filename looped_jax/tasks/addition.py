"""Sums of many numbers. Source: Saunshi et al., arXiv 2502.17416, n-ary addition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from looped_jax.config.options import at_least
from looped_jax.config.registry import TASKS
from looped_jax.tasks.generated import GeneratedTask, Row

PLUS, EQUALS = 10, 11


@dataclass(frozen=True)
class AdditionSettings:
    numbers: int = at_least(2, 32, "of a sum to train on, at most")
    test_numbers: int = at_least(2, 32, "of a sum to test with, at most")
    digits: int = at_least(1, 3, "of each number", high=9)


@TASKS.register("addition")
class Addition(GeneratedTask):
    """The sum of n numbers.

    Tokens: digits, + and =. A row is n numbers of `digits` digits, as 012+345+…=, and their sum,
    all with leading zeros; n is uniform from 2. Owed: the digits of the sum, the highest first, one
    answer a row. Numbers are uniform.
    """

    Settings = AdditionSettings
    difficulty = "numbers"

    def sizes(self) -> tuple[int, int]:
        s = self.settings
        most = max(s.numbers, s.test_numbers)
        return EQUALS + 1, most * (s.digits + 1) + self._places() - 1

    def _places(self) -> int:
        """Digits of a sum."""
        s = self.settings
        return len(str(max(s.numbers, s.test_numbers) * (10**s.digits - 1)))

    def row(self, random: np.random.Generator, *, test: bool, loops: Sequence[int] = ()) -> Row:
        s = self.settings
        count = int(random.integers(2, (s.test_numbers if test else s.numbers) + 1))
        digits = random.integers(0, 10, (count, s.digits))
        total = int((digits @ 10 ** np.arange(s.digits)[::-1]).sum())
        told = np.concatenate([digits, np.full((count, 1), PLUS)], axis=1).ravel()
        told[-1] = EQUALS
        places = self._places()
        tokens = np.concatenate([told, [int(digit) for digit in f"{total:0{places}}"]])
        answers = np.where(np.arange(len(tokens)) < len(told), -1, 0)
        difficulty = np.where(answers < 0, -1, count)
        return Row.of_tokens(tokens, answers, difficulty, length=self.length)

    def word(self, token: int) -> str:
        return "0123456789+="[token]
