"""Names and sizes of graphs, as they are drawn."""

import numpy as np
import pytest

from looped_jax.tasks.names import Spelling, some_nodes


@pytest.mark.parametrize("spelling", [Spelling(4, 2, 4), Spelling(50, 1, 2), Spelling(9, 1, 1)])
def test_names_are_different_words_of_the_alphabet_whose_last_letter_is_marked(spelling):
    every = Spelling(3, 1, 2).draw(np.random.default_rng(0), 12)
    assert sorted(map(tuple, every)) == sorted(
        [(a + 3,) for a in range(3)] + [(a, b + 3) for a in range(3) for b in range(3)]
    )
    names = spelling.draw(np.random.default_rng(0), 9)
    assert len(set(map(tuple, names))) == 9
    for name in names:
        assert spelling.shortest <= len(name) <= spelling.longest
        assert [token >= spelling.letters for token in name] == [False] * (len(name) - 1) + [True]
        assert max(name) < 2 * spelling.letters


def test_small_graphs_are_likelier():
    random = np.random.default_rng(0)
    drawn = np.bincount([some_nodes(random, 6) for _ in range(4000)], minlength=7)
    weights = 1 / (np.arange(3, 7) + 6**0.5)
    assert drawn[:3].sum() == 0
    np.testing.assert_allclose(drawn[3:] / 4000, weights / weights.sum(), atol=0.03)
