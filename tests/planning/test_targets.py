"""Names of devices to compile for, and what is said where their compilers are not installed."""

import pytest

from looped_jax.errors import ConfigError
from looped_jax.planning import targets


def test_names_say_kind_and_number():
    assert targets.parse("a100:2x8") == ("a100", (2, 8)) and targets.size("a100:2x8") == 16
    assert targets.parse("RTX4090") == ("rtx4090", (1,))
    assert targets.parse("tpu-v5e:4x4") == ("v5e", (4, 4))
    assert targets.size("v5p:4x4x4") == 64
    assert targets.device("v5e:4x4").name == "tpu-v5e"
    assert targets.device("h100:8").attention.kernel == "cudnn"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h100x:8", "--target=h100x:8 is unknown; give devices and their number, as h100:8"),
        ("h100:2x2x2", "--target=h100:2x2x2 has no such shape; h100: 8 or 2x8"),
        ("h100:0", "--target=h100:0 has no such shape"),
        ("v5p:4x4", "--target=v5p:4x4 has no such shape; v5p: 4x4x4"),
        ("v5e", "--target=v5e has no such shape; v5e: 4x4"),
    ],
)
def test_names_of_nothing_are_refused(name, said):
    with pytest.raises(ConfigError) as refused:
        targets.parse(name)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(("name", "whose"), [("h100:8", "NVIDIA GPUs"), ("v5e:4x4", "TPUs")])
def test_a_compiler_that_is_not_installed_is_named_with_what_brings_it(name, whose, monkeypatch):
    monkeypatch.setattr(targets, "_installed", lambda module: False)
    with pytest.raises(ConfigError, match=f"compiler of {whose}.*looped_jax.targets"):
        targets.look_for_compilers(name)
