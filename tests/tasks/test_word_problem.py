"""Running products, by moving things about."""

import itertools

import numpy as np
import pytest

from tests.tasks.test_generated import judged_rows


@pytest.mark.parametrize("objects", [2, 3, 5])
def test_it_owes_the_product_of_all_so_far(objects):
    permutations = list(itertools.permutations(range(objects)))
    _, rows = judged_rows("word_problem", 10, test=True, objects=objects)
    for row in rows:
        where = list(range(objects))  # of each thing
        for place, number in enumerate(row.inputs.tolist()):
            where = [permutations[number][at] for at in where]
            assert permutations[row.targets[place]] == tuple(where)
    if objects == 2:
        assert all((row.targets == row.inputs.cumsum() % 2).all() for row in rows)


def test_training_owes_the_first_places_and_difficulty_is_a_power_of_two():
    _, (row,) = judged_rows("word_problem", 1, test=False)
    assert (row.targets[:32] >= 0).all() and (row.targets[32:] == -1).all()
    assert row.difficulty[:9].tolist() == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert np.array_equal(row.difficulty < 0, row.targets < 0)
