"""p-hop strings: the answer, found again from the left."""

import numpy as np
import pytest

from looped_jax.tasks.p_hop import hop
from tests.tasks.test_generated import judged_rows


@pytest.mark.parametrize("test", [False, True])
def test_it_owes_the_symbol_that_so_many_hops_lead_to(test):
    _, rows = judged_rows("p_hop", 40, test=test, hops=5, length=64, seq_len=64)
    answers = []
    for row in rows:
        string = "".join(map(str, row.inputs.tolist()))
        assert all(a != b for a, b in zip(string, string[1:], strict=False))
        left = string
        for _ in range(5):
            left = left[: left[:-1].rindex(left[-1]) + 2]
        assert row.targets[-1] == int(left[-1]) and row.difficulty[-1] == 0
        assert (row.targets[:-1] == -1).all() and (row.difficulty[:-1] == -1).all()
        answers.append(left[-1])
    assert set(answers) == set("0123")


def test_a_hop_that_leads_nowhere_is_none():
    string = np.array([0, 1, 2, 0])
    assert hop(string, 1) == 1 and hop(string, 2) is None
