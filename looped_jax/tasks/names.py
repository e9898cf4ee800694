"""Names of nodes: words of some letters whose last one is marked, so that they can stand together.

Source: Allen-Zhu, "Physics of language models" 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from looped_jax.errors import ConfigError


@dataclass(frozen=True)
class Spelling:
    """Words of `shortest` to `longest` letters.

    Tokens are 0 … 2 · letters − 1: a letter, and the same letter where it ends a word.
    """

    letters: int
    shortest: int
    longest: int

    @property
    def words(self) -> int:
        """How many there are."""
        return sum(self.letters**n for n in range(self.shortest, self.longest + 1))

    def check(self, nodes: int, *, task: str) -> None:
        """Raises ConfigError where there are too few names for so many nodes."""
        if self.shortest > self.longest or self.words < nodes:
            raise ConfigError(
                f"data.tasks.{task}: names of {self.shortest} to {self.longest} of {self.letters} "
                f"letters are {self.words}, for nodes={nodes}; raise letters or longest"
            )

    def draw(self, random: np.random.Generator, nodes: int) -> list[list[int]]:
        """So many different words, uniform among all, as tokens."""
        found = []
        for number in random.choice(self.words, nodes, replace=False).tolist():
            length = self.shortest
            while number >= self.letters**length:
                number -= self.letters**length
                length += 1
            word = [number // self.letters**place % self.letters for place in range(length)]
            word[-1] += self.letters
            found.append(word)
        return found


def some_nodes(random: np.random.Generator, most: int) -> int:
    """How many nodes a graph to train on has: n from 3 with weight 1 / (n + √most)."""
    counts = np.arange(3, most + 1)
    weights = 1 / (counts + most**0.5)
    return int(random.choice(counts, p=weights / weights.sum()))
