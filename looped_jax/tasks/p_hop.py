"""p-hop induction: p times from a symbol to what followed its last occurrence.

Source: Sanford et al., "Transformers, parallel computation, and logarithmic depth", 2024; Saunshi
et al., arXiv 2502.17416.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from looped_jax.config.options import at_least
from looped_jax.config.registry import TASKS
from looped_jax.errors import ConfigError
from looped_jax.tasks.generated import GeneratedTask, Row


@dataclass(frozen=True)
class PHopSettings:
    symbols: int = at_least(3, 4, "of the alphabet")
    length: int = at_least(2, 256, "n, symbols of a row")
    hops: int = at_least(1, 16, "p")


@TASKS.register("p_hop")
class PHop(GeneratedTask):
    """p hops through a random string.

    A hop goes from a symbol to the nearest earlier occurrence of it, and from there one place on.
    Owed at the last place alone: the symbol reached from it by p hops. Strings are uniform among
    those that have no two equal neighbours, where a hop would lead nowhere, and room for p hops.
    Chance is 1 / symbols. Rows to test with are as those to train on.
    """

    Settings = PHopSettings

    def sizes(self) -> tuple[int, int]:
        s = self.settings
        if s.length < (least := 2 * s.symbols * s.hops):
            raise ConfigError(
                f"data.tasks.{self.name}.length={s.length} is short for {s.hops} hops over "
                f"{s.symbols} symbols; give {least} or more, or fewer hops"
            )
        return s.symbols, s.length

    def row(self, random: np.random.Generator, *, test: bool, loops: Sequence[int] = ()) -> Row:
        s = self.settings
        reached = None
        while reached is None:
            steps = random.integers(1, s.symbols, s.length)
            steps[0] = random.integers(s.symbols)
            string = np.cumsum(steps) % s.symbols
            reached = hop(string, s.hops)
        targets = np.full(s.length, -1)
        targets[-1] = string[reached]
        return Row(string, targets, np.where(targets < 0, -1, 0))


def hop(string: np.ndarray, hops: int) -> int | None:
    """The place that so many hops from the last one lead to; None where one of them cannot."""
    place = len(string) - 1
    for _ in range(hops):
        earlier = np.flatnonzero(string[:place] == string[place])
        if not len(earlier):
            return None
        place = int(earlier[-1]) + 1
    return place
