"""Verdicts on short and lonely runs; those on the reference's numbers: benchmarks/test_claim.py."""

import numpy as np
import pytest

from looped_jax.experiments.comparison import outcomes, verdict
from looped_jax.experiments.comparison.run_record import read
from tests.experiments.comparison.recorded import record

FALLING = np.linspace(5, 3, 100)
CALM = np.ones(100)


@pytest.mark.parametrize(
    ("loss", "norms", "single", "outcome"),
    [
        (FALLING, CALM, FALLING, "trains"),
        (np.full(100, 5.0), CALM, FALLING, "unstable"),  # a plateau alone
        (np.full(100, 5.0), CALM, None, "trains"),  # nobody says that it should have fallen
        (FALLING, np.tile([0.2, 1.8], 50), None, "unstable"),
        (FALLING, np.where(np.arange(100) == 3, 6, 1), FALLING, "unstable"),  # a peak
        (np.full(100, 5.0), np.tile([0.2, 1.8], 50), FALLING, "collapsed"),
        (np.where(np.arange(100) == 99, np.nan, FALLING), CALM, None, "collapsed"),
        (FALLING[:1], CALM[:1], None, "trains"),
    ],
)
def test_signs(loss, norms, single, outcome):
    one_loop = None if single is None else (single, CALM)
    found = verdict.judge(loss, norms, one_loop)
    assert found.outcome == outcome and found.compared == (single is not None)


def test_a_run_is_held_against_one_loop_of_its_seed(tmp_path):
    made = {
        "single": {"loops": 1, "variant": "LT"},
        "single_seed1": {"loops": 1, "seed": 1, "level": 9.0},
        "flat": {"loops": 4, "level": 8.0, "last": 50},
        "seed1": {"loops": 4, "level": 8.0, "seed": 1},
        "other": {"loops": 4, "level": 8.0, "lr": 0.5},
    }
    runs = [read(record(tmp_path / name, **how)) for name, how in made.items()]
    found = outcomes.of(runs)
    assert {name: end.verdict.compared for name, end in found.items()} == {
        "single": True, "single_seed1": True, "flat": True, "seed1": True, "other": False,
    }  # fmt: skip
    assert found["flat"].verdict.outcome == "trains"  # far above, but it falls as one loop does
    assert outcomes.together([found["flat"], found["seed1"]]) == (
        "1 trains (50 of 60 steps), 1 trains"
    )
