"""Graphs of pointers: every answer, found again by walking the edges that a row tells."""

import numpy as np
import pytest

from tests.tasks.test_generated import LENGTHS, judged_rows, task


def told(found, row):
    """The edges that a row tells, and its queries with their places, read from the words."""
    words = [found.word(token) for token in row.inputs.tolist()]
    edges = dict(map(int, word.split(">")) for word in words if ">" in word)
    queries = {place: word[1:] for place, word in enumerate(words) if word.startswith("?")}
    assert len(edges) + len(queries) == len(words)
    assert set(edges.values()) <= set(edges)
    return edges, queries


def owed(row):
    return set(np.flatnonzero(row.difficulty >= 0).tolist())


def walk(edges, start, steps):
    for _ in range(steps):
        start = edges[start]
    return start


@pytest.mark.parametrize("test", [False, True])
def test_chain_end_owes_the_end_of_every_nodes_chain(test):
    found, made = judged_rows("chain_end", 50, test=test)
    seen = set()
    for row in made:
        edges, queries = told(found, row)
        assert sorted(edges) == sorted(map(int, queries.values())) == list(range(16))
        assert owed(row) == set(queries)
        distances = []
        for place, start in queries.items():
            node, distance = int(start), 0
            while edges[node] != node:
                node, distance = edges[node], distance + 1
            assert row.targets[place] == node and row.difficulty[place] == distance
            distances.append(distance)
        inner = [node for node, to in edges.items() if node != to]
        assert len({edges[node] for node in inner}) == len(inner)  # chains do not join
        seen |= {tuple(np.bincount(distances))}
    if test:
        assert seen == {(2,) * 8}
    else:
        assert {len(counts) for counts in seen} <= {3, 4} and len(seen) > 20


def test_chains_are_cut_anywhere():
    _, made = judged_rows("chain_end", 400, test=False)
    longest = [row.difficulty.max() for row in made]
    chains = np.array([(row.difficulty == 0).sum() for row in made])
    assert max(longest) == 3
    assert chains.min() >= 4 and 6 < chains.mean() < 8  # 16 nodes, 2.5 a chain, the last one cut


def test_hops_owe_the_node_so_many_hops_away_on_a_cycle():
    found, made = judged_rows("hops", 50, test=True)
    asked = set()
    for row in made:
        edges, queries = told(found, row)
        assert {walk(edges, 0, k) for k in range(8)} == set(range(8))
        assert owed(row) == set(queries) and len(queries) == 16
        for place, query in queries.items():
            start, hops = map(int, query.split("+"))
            assert row.targets[place] == walk(edges, start, hops)
            assert row.difficulty[place] == hops
            asked.add((start, hops))
    assert asked == {(start, hops) for start in range(8) for hops in (1, 2, 3, 4)}


def test_steps_owe_one_hop_more_after_every_loop():
    loops = (1, 2, 5, 9, 64)
    found, made = judged_rows("steps", 50, test=True, loops=loops)
    for row in made:
        edges, queries = told(found, row)
        assert {walk(edges, 0, k) for k in range(9)} == set(range(9))
        assert owed(row) == set(queries)
        assert row.targets.shape == (5, LENGTHS["steps"])
        for k, targets in zip(loops, row.targets, strict=True):
            assert owed(row) == set(np.flatnonzero(targets >= 0).tolist())
            for place, start in queries.items():
                assert targets[place] == walk(edges, int(start), k)


def test_a_word_is_one_token():
    for name in ("chain_end", "hops", "steps"):
        found, _ = task(name)
        assert len({found.word(token) for token in range(found.vocab_size)}) == found.vocab_size
