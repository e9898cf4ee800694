"""Hops along named nodes, walked again on the pairs that a row tells."""

import pytest

from tests.tasks.test_generated import judged_rows

OWN = {"nodes": 12, "hops": 4, "letters": 3, "shortest": 2, "longest": 3}
LENGTH = 2 * 12 * 3 + 10 * 2 * 4


def words(tokens, letters=3):
    """Tokens as a list of names, each a tuple, and of single tokens that are no letters."""
    found, name = [], ()
    for token in tokens:
        name = (*name, token)
        if token >= letters:
            found.append(name)
            name = ()
    assert not name
    return found


@pytest.mark.parametrize("test", [False, True])
def test_it_owes_the_name_so_many_hops_away(test):
    _, rows = judged_rows("depo", 30, test=test, seq_len=LENGTH, **OWN)
    sizes, asked = set(), set()
    for row in rows:
        last = int((row.targets >= 0).nonzero()[0][-1])
        told = words([*row.inputs[: last + 1].tolist(), int(row.targets[last])])
        start, ask = (6,), (11,)
        assert told[0] == start
        nodes = (next(i for i, w in enumerate(told[1:], 1) if 7 <= w[0] <= 10) - 1) // 2
        pairs, queries = told[1 : 1 + 2 * nodes], told[1 + 2 * nodes :]
        follow = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(follow) == nodes == len({*follow.values()})
        assert len(queries) == 4 * min(nodes, 10)
        starts, expected, difficulty, number = set(), [], [], []
        for i, (k, node, mark, answer) in enumerate(
            zip(*(queries[n::4] for n in range(4)), strict=True)
        ):
            hops, reached = k[0] - 6, node
            for _ in range(hops):
                reached = follow[reached]
            assert mark == ask and answer == reached
            expected += answer
            difficulty += [hops] * len(answer)
            number += [i] * len(answer)
            starts.add(node)
            asked.add(hops)
        owed = row.targets >= 0
        assert row.targets[owed].tolist() == expected and len(starts) == min(nodes, 10)
        assert row.difficulty[owed].tolist() == difficulty
        assert row.answers[owed].tolist() == number
        sizes.add(nodes)
    assert asked == ({1, 2, 4} if test else {1, 2, 3, 4})
    assert sizes == {12} if test else len(sizes) > 4 and min(sizes) >= 3


def test_the_sizes_of_depo2_fit():
    own = {"nodes": 75, "hops": 16, "letters": 3, "shortest": 5, "longest": 7}
    length = 2 * 75 * 7 + 10 * 2 * 8
    found, rows = judged_rows("depo", 3, test=True, seq_len=length, **own)
    assert found.vocab_size == 2 * 3 + 16 + 2
    assert all({*row.difficulty.tolist()} <= {-1, 1, 2, 4, 8, 16} for row in rows)
