"""The word problem of a symmetric group: running products of permutations.

For five objects it is complete for NC¹ (Barrington, 1989): a model of fixed depth has to find
shortcuts that fail on longer words (Liu et al., arXiv 2210.10749); by halves its depth is log n.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from looped_jax.config.options import at_least
from looped_jax.config.registry import TASKS
from looped_jax.tasks.generated import GeneratedTask, Row


@dataclass(frozen=True)
class WordProblemSettings:
    objects: int = at_least(2, 5, "that are permuted; of 2 it is running parity", high=6)
    length: int = at_least(1, 32, "of a word to train on")
    test_length: int = at_least(1, 64, "of a word to test with")


@TASKS.register("word_problem")
class WordProblem(GeneratedTask):
    """Running products of random permutations.

    Tokens: the permutations of `objects` things, in lexicographic order. A row is a word of them;
    owed at every place: the product of all so far, the first applied first. Rows to train on are as
    long as those to test with, but nothing is owed behind `length`. The difficulty of an answer is
    the number of its factors, rounded up to a power of two. Chance is 1 / objects!.
    """

    Settings = WordProblemSettings
    difficulty = "length"

    def sizes(self) -> tuple[int, int]:
        s = self.settings
        return len(products(s.objects)), max(s.length, s.test_length)

    def row(self, random: np.random.Generator, *, test: bool, loops: Sequence[int] = ()) -> Row:
        s = self.settings
        table = products(s.objects)
        word = random.integers(0, len(table), self.length)
        running = list(itertools.accumulate(word.tolist(), lambda done, g: table[done][g]))
        place = np.arange(1, self.length + 1)
        owed = place <= (s.test_length if test else s.length)
        return Row(
            word,
            np.where(owed, running, -1),
            np.where(owed, 2 ** np.ceil(np.log2(place)), -1),
        )


@functools.lru_cache
def products(objects: int) -> list[list[int]]:
    """Number of the permutation that applies the first of two and then the second."""
    permutations = list(itertools.permutations(range(objects)))
    number = {permutation: n for n, permutation in enumerate(permutations)}
    return [
        [number[tuple(second[i] for i in first)] for second in permutations]
        for first in permutations
    ]
