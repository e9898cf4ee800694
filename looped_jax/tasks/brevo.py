"""Brevo: what a node depends on, in order. Source: Allen-Zhu, "Physics of language models" 4.1."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from looped_jax.config.options import at_least
from looped_jax.config.registry import TASKS
from looped_jax.tasks.generated import GeneratedTask, Row
from looped_jax.tasks.names import Spelling, some_nodes

CHILDREN = PARENTS = 4  # of a node, at most


@dataclass(frozen=True)
class BrevoSettings:
    """Brevo1 of the source; Brevo2 has 30 nodes, and names of 2 to 4 of 4 letters."""

    nodes: int = at_least(3, 70, "N, of a graph at most")
    letters: int = at_least(1, 70, "of names")
    shortest: int = at_least(1, 1, "name, in letters")
    longest: int = at_least(1, 1, "name, in letters")


@TASKS.register("brevo")
class Brevo(GeneratedTask):
    """All that a node depends on, dependencies first.

    A graph of n nodes: the first 1 to (n − 1) // 4 + 1 are leaves; each later one depends on 1 to 4
    earlier ones that fewer than four nodes depend on so far. A row: a start token, all pairs (node,
    dependency) in random order, a token that asks, the last node, a token that ends the question,
    and owed from there: every node that it depends on, directly or not, dependencies first, and
    that token again. Of nodes that could be next the one whose name is first comes, so that one
    answer is right; in the source ties are random and any order is. A row is right if all its
    tokens are, each after the right ones before it. Difficulty: the longest way to a leaf. In
    training n is from 3 with weight 1 / (n + √N), in tests N.
    """

    Settings = BrevoSettings
    difficulty = "depth"

    def sizes(self) -> tuple[int, int]:
        s = self.settings
        self.spelling = Spelling(s.letters, s.shortest, s.longest)
        self.spelling.check(s.nodes, task=self.name)
        pairs = CHILDREN * (s.nodes - 1)
        return 2 * s.letters + 3, (2 * pairs + s.nodes) * s.longest + 3

    def row(self, random: np.random.Generator, *, test: bool, loops: Sequence[int] = ()) -> Row:
        s = self.settings
        nodes = s.nodes if test else some_nodes(random, s.nodes)
        names, children = self.spelling.draw(random, nodes), graph(random, nodes)
        order = dependencies(children, names)
        start, ask, end = (2 * s.letters + number for number in range(3))
        pairs = [(node, child) for node, of in enumerate(children) for child in of]
        tokens = [start]
        for number in random.permutation(len(pairs)).tolist():
            node, child = pairs[number]
            tokens += [*names[node], *names[child]]
        tokens += [ask, *names[-1], end]
        answer = [*(token for node in order for token in names[node]), end]
        owed = np.arange(len(tokens) + len(answer)) >= len(tokens)
        return Row.of_tokens(
            np.array([*tokens, *answer]),
            np.where(owed, 0, -1),
            np.where(owed, depths(children)[-1], -1),
            length=self.length,
        )


def graph(random: np.random.Generator, nodes: int) -> list[list[int]]:
    """What each node depends on, of a random graph; all of it is earlier."""
    leaves = int(random.integers(1, (nodes - 1) // 4 + 2))
    children: list[list[int]] = [[] for _ in range(nodes)]
    parents = np.zeros(nodes, int)
    for node in range(leaves, nodes):
        free = np.flatnonzero(parents[:node] < PARENTS)
        count = min(int(random.integers(1, CHILDREN + 1)), len(free))
        children[node] = random.choice(free, count, replace=False).tolist()
        parents[children[node]] += 1
    return children


def dependencies(children: Sequence[Sequence[int]], names: Sequence[Sequence[int]]) -> list[int]:
    """What the last node depends on, dependencies first, the first name first among the ready."""
    needed, ahead = set(), [*children[-1]]
    while ahead:
        node = ahead.pop()
        if node not in needed:
            needed.add(node)
            ahead += children[node]
    waits = {node: len(children[node]) for node in needed}
    ready = [(names[node], node) for node in needed if not waits[node]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, done = heapq.heappop(ready)
        order.append(done)
        for node in needed:
            if done in children[node]:
                waits[node] -= 1
                if not waits[node]:
                    heapq.heappush(ready, (names[node], node))
    return order


def depths(children: Sequence[Sequence[int]]) -> list[int]:
    """The longest way from each node to a leaf, in edges."""
    found: list[int] = []
    for of in children:
        found.append(1 + max((found[child] for child in of), default=-1))
    return found
