"""What processes have to agree on; two real ones differ in test_distributed.py."""

import pytest

from looped_jax.errors import ConfigError, DataError, UserError
from looped_jax.runtime import agreement, distributed


def answers_of(monkeypatch, *others):
    """Let gather_json find these behind what this process says, in the order of the questions."""
    answers = iter(others)
    monkeypatch.setattr(distributed, "gather_json", lambda mine: [mine, *next(answers)])


def test_differences_are_named_by_process_and_of_files_by_name(monkeypatch):
    files = [{"name": name, "size": 1} for name in "abc"]
    mine = {"train.eval_every": 8, "data.train": files, "data.val": files[0]}
    other = mine | {"data.train": [files[0], {"name": "c", "size": 2}, {"name": "d"}]}
    answers_of(monkeypatch, ["1", "2"], [["process 1 on h1", mine | {"train.eval_every": 9}],
                                        ["process 2 on h2", other]])  # fmt: skip
    with pytest.raises(ConfigError) as error:
        agreement.check_alike(mine)
    said = str(error.value)
    assert "differ from process 0 on " in said
    assert "train.eval_every is 9, not 8, in process 1 on h1" in said
    assert "data.train is without b and with d and with another c in process 2 on h2" in said
    assert "data.val" not in said


def test_an_error_of_one_process_ends_the_others_with_its_words(monkeypatch):
    answers_of(monkeypatch, ["process 1 on h1: data.path: none"], [None])
    with pytest.raises(UserError, match="process 1 on h1: data.path: none"), agreement.together():
        pass
    with pytest.raises(DataError, match="mine"), agreement.together():
        raise DataError("mine")
