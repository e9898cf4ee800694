"""What a node depends on, found again from the pairs that a row tells."""

import pytest

from tests.tasks.test_depo import words
from tests.tasks.test_generated import judged_rows

OWN = {"nodes": 20, "letters": 3, "shortest": 2, "longest": 4}
LENGTH = (2 * 4 * 19 + 20) * 4 + 3


def everything(needs, node):
    """What a node needs, directly or not."""
    return needs[node].union(*(everything(needs, child) for child in needs[node]))


def in_order(needs, wanted):
    """`wanted` so that all that a node needs is before it, the first name first."""
    order = []
    while len(order) < len(wanted):
        ready = [name for name in wanted - {*order} if needs[name] <= {*order}]
        order.append(min(ready))
    return order


def longest(needs, node):
    return max((1 + longest(needs, child) for child in needs[node]), default=0)


@pytest.mark.parametrize("test", [False, True])
def test_it_owes_every_dependency_in_the_one_order_by_names(test):
    _, rows = judged_rows("brevo", 30, test=test, seq_len=LENGTH, **OWN)
    sizes, depths = set(), set()
    for row in rows:
        last = int((row.targets >= 0).nonzero()[0][-1])
        told = words([*row.inputs[: last + 1].tolist(), int(row.targets[last])])
        start, ask, end = (6,), (7,), (8,)
        question = told.index(ask)
        assert told[0] == start and told[question + 2] == told[-1] == end
        query, answer = told[question + 1], told[question + 3 : -1]
        pairs = told[1:question]
        needs = {name: set() for name in pairs}
        for node, child in zip(pairs[::2], pairs[1::2], strict=True):
            assert child not in needs[node]
            needs[node].add(child)
        assert max(map(len, needs.values())) <= 4
        assert max(sum(name in of for of in needs.values()) for name in needs) <= 4
        assert answer == in_order(needs, everything(needs, query))
        owed = row.targets >= 0
        assert words(row.targets[owed].tolist()) == [*answer, end]
        depth = longest(needs, query)
        assert {*row.difficulty[owed].tolist()} == {depth} and {*row.answers[owed].tolist()} == {0}
        sizes.add(len(needs))
        depths.add(depth)
    assert len(depths) > 3
    assert sizes <= {18, 19, 20} if test else min(sizes) < 10  # an unused leaf is in no pair
