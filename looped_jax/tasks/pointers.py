"""Pointers: a graph in which every node points to one, as one token each, then questions about it.

An edge (a, f(a)) is a single token, so a model of one layer can follow it: in two tokens it would
first have to join them, for which one layer is too few. All tokens of a row are different things:
answers are nodes, queries name where to start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from looped_jax.config.options import at_least, either
from looped_jax.config.registry import TASKS
from looped_jax.errors import ConfigError
from looped_jax.tasks.generated import GeneratedTask, Row


def asked(
    random: np.random.Generator,
    *,
    edges: np.ndarray,
    queries: np.ndarray,
    answers: np.ndarray,
    difficulty: np.ndarray,
) -> Row:
    """Edges [N] in random order, then queries [Q], each owing its answer, [Q] or [K, Q]."""
    before = np.full((*answers.shape[:-1], len(edges)), -1)
    return Row(
        np.concatenate([random.permutation(edges), queries]),
        np.concatenate([before, answers], axis=-1),
        np.concatenate([np.full(len(edges), -1), difficulty]),
    )


@dataclass(frozen=True)
class ChainEndSettings:
    nodes: int = at_least(2, 16, "N")
    distance: int = at_least(0, 3, "of a node to the end of its chain, in training at most")
    test_chains: int = at_least(1, 2, "of equal length, in a row to test with")


@TASKS.register("chain_end")
class ChainEnd(GeneratedTask):
    """To the end of the chain: tested on longer ones than those trained on.

    N nodes in chains; each points to the next, the end to itself. Tokens: answers 0 … N − 1, query
    N + start, edge 2N + a·N + f(a). A row is N edges in random order, then N queries, one a node in
    random order; each owes the end of its chain. Chains to train on have random lengths, uniform
    from 1 to `distance` + 1, the last is what is left of N nodes; those to test with are
    `test_chains` of equal length. Chance is 1 / N.
    """

    Settings = ChainEndSettings
    difficulty = "distance"

    def sizes(self) -> tuple[int, int]:
        n, chains = self.settings.nodes, self.settings.test_chains
        if n % chains:
            fits = [c for c in range(1, n + 1) if n % c == 0]
            raise ConfigError(
                f"data.tasks.{self.name}.test_chains={chains} does not divide nodes={n} into "
                f"chains of equal length; choose {either(fits)}"
            )
        return 2 * n + n * n, 2 * n

    def row(self, random: np.random.Generator, *, test: bool, loops: Sequence[int] = ()) -> Row:
        n = self.settings.nodes
        if test:
            lengths = np.full(self.settings.test_chains, n // self.settings.test_chains)
        else:
            lengths = random.integers(1, self.settings.distance + 2, n)
        ends = np.minimum(np.cumsum(lengths), n) - 1  # places of the ends, the chains in a line
        places = np.arange(n)
        end_of = ends[np.searchsorted(ends, places)]
        nodes = random.permutation(n)  # by place
        following = nodes[np.minimum(places + 1, end_of)]
        order = random.permutation(n)
        return asked(
            random,
            edges=2 * n + nodes * n + following,
            queries=n + nodes[order],
            answers=nodes[end_of[order]],
            difficulty=(end_of - places)[order],
        )

    def word(self, token: int) -> str:
        return _word(token, self.settings.nodes, 1)


@dataclass(frozen=True)
class HopsSettings:
    nodes: int = at_least(2, 8, "N")
    distance: int = at_least(1, 4, "P, hops that are asked for at most")
    queries: int = at_least(1, 16, "of a row")


@TASKS.register("hops")
class Hops(GeneratedTask):
    """A few hops along a cycle.

    f is a random cycle of N nodes. Tokens: answers 0 … N − 1, query (start, h) N + (h − 1)·N +
    start for h = 1 … P, edge N + P·N + a·N + f(a). A row is N edges in random order, then queries
    with random start and h; each owes f^h(start). Answers are not fed back. Chance is 1 / N. Rows
    to test with are as those to train on.
    """

    Settings = HopsSettings
    difficulty = "distance"

    def sizes(self) -> tuple[int, int]:
        n, p = self.settings.nodes, self.settings.distance
        return n + p * n + n * n, n + self.settings.queries

    def row(self, random: np.random.Generator, *, test: bool, loops: Sequence[int] = ()) -> Row:
        n, p, queries = self.settings.nodes, self.settings.distance, self.settings.queries
        cycle = random.permutation(n)
        starts, hops = random.integers(0, n, queries), random.integers(1, p + 1, queries)
        return asked(
            random,
            edges=n + p * n + cycle * n + np.roll(cycle, -1),
            queries=n + (hops - 1) * n + cycle[starts],
            answers=cycle[(starts + hops) % n],
            difficulty=hops,
        )

    def word(self, token: int) -> str:
        return _word(token, self.settings.nodes, self.settings.distance)


@dataclass(frozen=True)
class StepsSettings:
    nodes: int = at_least(2, 9, "N; after N loops the answer is the start, so divide no count")
    queries: int = at_least(1, 16, "of a row")


@TASKS.register("steps")
class Steps(GeneratedTask):
    """One hop a loop: a target for every loop.

    As hops, but a query names its start alone, token N + start, and after loop k f^k(start) is
    owed: in training for the loops that model.loss reads, in tests at every loop count, also beyond
    the trained ones. Edge: 2N + a·N + f(a). Chance is 1 / N.
    """

    Settings = StepsSettings
    target_per_loop = True

    def sizes(self) -> tuple[int, int]:
        n = self.settings.nodes
        return 2 * n + n * n, n + self.settings.queries

    def row(self, random: np.random.Generator, *, test: bool, loops: Sequence[int]) -> Row:
        n, queries = self.settings.nodes, self.settings.queries
        cycle = random.permutation(n)
        starts = random.integers(0, n, queries)
        return asked(
            random,
            edges=2 * n + cycle * n + np.roll(cycle, -1),
            queries=n + cycle[starts],
            answers=cycle[(starts + np.array(loops)[:, None]) % n],
            difficulty=np.zeros(queries),
        )

    def word(self, token: int) -> str:
        return _word(token, self.settings.nodes, 1)


def _word(token: int, nodes: int, distances: int) -> str:
    """A node as 3, an edge as 3>5, a query as ?3, and as ?3+2 where one of several hops asks."""
    kind, node = divmod(token, nodes)
    if kind == 0:
        return str(node)
    if kind <= distances:
        return f"?{node}" if distances == 1 else f"?{node}+{kind}"
    return f"{kind - 1 - distances}>{node}"
