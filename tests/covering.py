"""Combinations of features: every pair of values in the quick tests, every product in all."""

import itertools

import pytest

from looped_jax.config.registry import LOOP_RULES

# For what is compiled often: without rules that mix state and embedding in another way than LT_i
# and are else as it is. They are tested in tests/model/loop_rules, and slowly with all parts.
DISTINCT_RULES = tuple(rule for rule in LOOP_RULES if rule not in ("gate", "linear"))


def every_pair(factors):
    """Rows that hold each pair of values of each two factors; greedy, so a few more than needed."""
    names, rows = list(factors), []

    def pairs(row):
        return set(itertools.combinations(sorted(row.items()), 2))

    open_pairs = set().union(
        *(pairs({a: x, b: y})
          for a, b in itertools.combinations(names, 2)
          for x in factors[a] for y in factors[b])
    )  # fmt: skip
    while open_pairs:
        row = dict(min(open_pairs, key=str))
        for name in names:
            if name not in row:
                row[name] = max(
                    factors[name], key=lambda value: len(pairs(row | {name: value}) & open_pairs)
                )
        open_pairs -= pairs(row)
        rows.append({name: row[name] for name in names})
    return rows


def grid(strength=2, **factors):
    """Parametrizes a test by all products; quick are as many as hold every pair of values, with
    strength 1 every value."""
    factors = {name: tuple(values) for name, values in factors.items()}
    if strength == 1:
        most = max(map(len, factors.values()))
        quick = [tuple(v[n % len(v)] for v in factors.values()) for n in range(most)]
    else:
        quick = [tuple(row.values()) for row in every_pair(factors)]
    rows = [
        pytest.param(*row, marks=() if row in quick else pytest.mark.slow)
        for row in itertools.product(*factors.values())
    ]
    return pytest.mark.parametrize(tuple(factors), rows)
