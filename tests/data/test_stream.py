"""Rows of one stream: every token predicted once, however long groups are; exact on restart."""

import itertools
import json

import grain
import numpy as np
import pytest

from looped_jax.data.packing.stream import PackedRows, Stream
from looped_jax.errors import DataError

SIZES = [[1, 2, 50, 1, 0, 3], [17], [16, 16], [5] * 9, [0, 0, 1], [1, 0, 0, 0]]


def packed(sizes, seq_len=4, shuffle_seed=None):
    """Iterator over rows of groups that count 0, 1, 2, … through the epoch."""
    ends = np.cumsum(sizes)
    groups = [np.arange(e - s, e, dtype=np.int32) for s, e in zip(sizes, ends, strict=True)]
    source = grain.MapDataset.source(groups)
    return iter(PackedRows(source, seq_len=seq_len, workers=0, shuffle_seed=shuffle_seed))


@pytest.mark.parametrize("sizes", SIZES)
def test_rows_are_the_endless_stream_cut_with_one_token_shared(sizes):
    rows = packed(sizes)
    stream = np.resize(np.arange(sum(sizes), dtype=np.int32), 161)
    expected = [stream[4 * r : 4 * r + 5] for r in range(40)]
    np.testing.assert_array_equal([next(rows) for _ in range(40)], expected)


def test_rows_of_a_group_are_shuffled_and_those_of_the_next_follow():
    plain, found, other = (
        np.array([*itertools.islice(packed([80, 80], shuffle_seed=seed), 79)])
        for seed in (None, 1, 2)
    )
    # 80 tokens end 19 rows at first, then 20: the token that two rows share is left over
    groups = [slice(0, 19), slice(19, 39), slice(39, 59), slice(59, 79)]
    for group in groups:
        assert sorted(found[group].tolist()) == sorted(plain[group].tolist())
        assert not np.array_equal(found[group], plain[group])
    assert not np.array_equal(found[groups[1]], found[groups[3]])  # each epoch in another order
    assert not np.array_equal(found, other)


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_position_continues_exactly_and_stays_small(sizes, shuffle_seed):
    rows = packed(sizes, shuffle_seed=shuffle_seed)
    states, found = [], []
    for _ in range(40):
        states.append(json.dumps(rows.get_state()))
        found.append(next(rows))
    for at, state in enumerate(states[:30]):
        assert len(json.loads(state)["head"]) <= 4
        fresh = packed(sizes, shuffle_seed=shuffle_seed)
        fresh.set_state(json.loads(state))
        np.testing.assert_array_equal([next(fresh) for _ in range(10)], found[at : at + 10])
        rows.set_state(json.loads(state))  # the same iterator can go back, too
        np.testing.assert_array_equal(next(rows), found[at])


def test_groups_without_any_token_are_an_error_instead_of_an_endless_search():
    with pytest.raises(DataError, match="all 3 row groups that this process trains on are empty"):
        next(packed([0, 0, 0]))


def test_epochs_count_how_often_the_groups_were_read():
    rows, packing = packed([8, 8, 8, 8]), Stream()
    found = []
    for _ in range(12):  # rows of 4 tokens and one that is shared
        next(rows)
        found.append(packing.epochs(rows.get_state(), [3, 1], index=0, count=1))
    assert found == sorted(found) and found[0] == 0 and found[-1] >= 1.25
    # of 3, 2 and 2 groups
    thirds = [packing.epochs({"group": 3}, [7], index=i, count=3) for i in range(3)]
    assert thirds == [1.0, 1.5, 1.5]
    positions = [{"group": g} for g in (9, 6, 6)]  # each has read its own three times
    alone = packing.remap_positions(positions, [7], index=0, count=1)
    assert packing.epochs(alone, [7], index=0, count=1) == 3.0
