"""Sums, added again from their text."""

import re

import pytest

from tests.tasks.test_generated import judged_rows


@pytest.mark.parametrize(("test", "most"), [(False, 4), (True, 6)])
def test_it_owes_the_digits_of_the_sum(test, most):
    length = 6 * 4 + 4 - 1
    found, rows = judged_rows("addition", 60, test=test, numbers=4, test_numbers=6, seq_len=length)
    counts = set()
    for row in rows:
        owed = row.targets >= 0
        text = "".join(map(found.word, row.inputs.tolist()))
        terms, given = re.fullmatch(r"((?:\d{3}[+])+\d{3})=(\d{3})0*", text).groups()
        numbers = [int(number) for number in terms.split("+")]
        total = f"{sum(numbers):04}"
        assert "".join(map(found.word, row.targets[owed].tolist())) == total
        assert given == total[:3]  # each digit is told once it was owed
        assert text[owed.argmax()] == "=" and owed.sum() == 4
        assert (row.difficulty[owed] == len(numbers)).all() and (row.answers[owed] == 0).all()
        assert (row.difficulty[~owed] == -1).all()
        counts.add(len(numbers))
    assert counts == set(range(2, most + 1))
