"""Depo: k hops along a cycle of named nodes.

Source: Allen-Zhu, "Physics of language models" 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from looped_jax.config.options import at_least
from looped_jax.config.registry import TASKS
from looped_jax.tasks.generated import GeneratedTask, Row
from looped_jax.tasks.names import Spelling, some_nodes

QUERIES = 10  # of a row, at most


@dataclass(frozen=True)
class DepoSettings:
    """Depo1 of the source; Depo2 has 75 nodes, 16 hops, and names of 5 to 7 of 3 letters."""

    nodes: int = at_least(3, 225, "N, of a cycle at most")
    hops: int = at_least(1, 8, "K, that are asked for at most")
    letters: int = at_least(1, 50, "of names")
    shortest: int = at_least(1, 1, "name, in letters")
    longest: int = at_least(1, 2, "name, in letters")


@TASKS.register("depo")
class Depo(GeneratedTask):
    """Hops along a cycle whose nodes have names of several tokens.

    A random cycle f of n nodes. A row: a start token, the pairs x f(x) in random order, then ten
    queries, or n of fewer nodes: a token for k, q, a token that asks, f^k(q). Owed: the names
    f^k(q), after the right names before them. Training: n from 3 with weight 1 / (n + √N), k
    uniform from 1 to K. Tests: n = N, k the powers of two up to K. Nodes asked for are different.
    """

    Settings = DepoSettings
    difficulty = "distance"

    def sizes(self) -> tuple[int, int]:
        s = self.settings
        self.spelling = Spelling(s.letters, s.shortest, s.longest)
        self.spelling.check(s.nodes, task=self.name)
        queries = min(s.nodes, QUERIES) * 2 * (1 + s.longest)
        return 2 * s.letters + s.hops + 2, 2 * s.nodes * s.longest + queries

    def row(self, random: np.random.Generator, *, test: bool, loops: Sequence[int] = ()) -> Row:
        s = self.settings
        nodes = s.nodes if test else some_nodes(random, s.nodes)
        names = self.spelling.draw(random, nodes)  # along the cycle
        start, ask = 2 * s.letters, 2 * s.letters + s.hops + 1
        tokens = [start]
        for node in random.permutation(nodes).tolist():
            tokens += [*names[node], *names[(node + 1) % nodes]]
        answers, difficulty = [-1] * len(tokens), [-1] * len(tokens)
        asked = random.permutation(nodes)[:QUERIES].tolist()
        if test:
            hops = 2 ** random.integers(0, s.hops.bit_length(), len(asked))
        else:
            hops = random.integers(1, s.hops + 1, len(asked))
        for number, (node, k) in enumerate(zip(asked, hops.tolist(), strict=True)):
            query = [start + k, *names[node], ask]
            answer = names[(node + k) % nodes]
            tokens += [*query, *answer]
            answers += [-1] * len(query) + [number] * len(answer)
            difficulty += [-1] * len(query) + [k] * len(answer)
        arrays = map(np.array, (tokens, answers, difficulty))
        return Row.of_tokens(*arrays, length=self.length)
