"""Expressions modulo 23, computed again from their words by a stack."""

import pytest

from tests.tasks.test_generated import judged_rows


def value(words):
    """Of a prefix expression, from its end."""
    stack = []
    for word in reversed(words):
        if word.isdigit():
            stack.append(int(word))
        else:
            a, b = stack.pop(), stack.pop()
            stack.append({"+": a + b, "-": a - b, "*": a * b}[word] % 23)
    (found,) = stack
    return found


@pytest.mark.parametrize(("test", "most"), [(False, 4), (True, 6)])
def test_it_owes_the_value_after_the_equals_sign_alone(test, most):
    found, rows = judged_rows(
        "mano", 100, test=test, operators=4, test_operators=6, seq_len=2 * 6 + 3
    )
    counts = set()
    for row in rows:
        words = [found.word(token) for token in row.inputs.tolist()]
        equals = words.index("=")
        told = words[1:equals]
        count = sum(not word.isdigit() for word in told)
        assert words[0] == f"#{count}"
        assert row.targets[equals] == value(told) and row.difficulty[equals] == count
        assert (row.targets >= 0).sum() == (row.difficulty >= 0).sum() == 1
        counts.add(count)
    assert counts == set(range(1, most + 1))
