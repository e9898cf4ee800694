"""Files as every room writes them: numbers that JSON has no word for never reach one."""

import ast
import json
import math
from pathlib import Path

import pytest

from looped_jax import files
from looped_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]
# Settings have to come back as they were, and those of a run are finite.
WRITES_PLAIN_JSON = {"looped_jax/training/run_folder.py"}


def test_what_is_not_finite_is_null(tmp_path):
    found = {"nats": [1.5, math.nan, (math.inf, -math.inf)], "text": "NaN", "of": {2: math.nan}}
    files.write_json(tmp_path / "a.json", found, indent=1)

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=no_constant)
    assert read == {"nats": [1.5, None, [None, None]], "text": "NaN", "of": {"2": None}}
    assert files.to_json({"a": 1.0}) == json.dumps({"a": 1.0})


@pytest.mark.parametrize("room", ["looped_jax", "torch_ref", "benchmarks"])
def test_no_json_is_written_by_other_means(room):
    """A call that writes must not get what json.dumps gives, which may be no JSON at all."""
    found = set()
    for path in (ROOT / room).rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            if not call.func.attr.startswith("write"):
                continue
            given = ast.unparse(ast.Tuple([*call.args, *(k.value for k in call.keywords)]))
            if "json.dumps" in given and "allow_nan=False" not in given:
                found.add(path.relative_to(ROOT).as_posix())
    assert found <= WRITES_PLAIN_JSON


@pytest.mark.parametrize(
    "given", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run"), "file:///tmp/run"]
)
def test_an_address_is_refused_with_the_mounts_that_work(given):
    message = f"train.run_dir={given} is an address; .*mount the bucket .gcsfuse., or use a disk"
    with pytest.raises(ConfigError, match=message):
        files.check_on_disk(given, "train.run_dir")


@pytest.mark.parametrize(
    "given", ["runs/a", "/mnt/bucket/run", "C:/runs", Path("a:b/c"), "builtin"]
)
def test_a_place_on_disk_is_none(given):
    files.check_on_disk(given, "train.run_dir")


def test_the_cache_is_on_disk_too(monkeypatch):
    monkeypatch.setenv("LOOPED_JAX_CACHE", "gs://bucket/cache")
    with pytest.raises(ConfigError, match="LOOPED_JAX_CACHE=gs://bucket/cache is an address"):
        files.default_cache_dir()
