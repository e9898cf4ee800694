"""The builtin corpus: real text, the same wherever it is made, whole or not there at all."""

import itertools

import pyarrow.parquet as pq
import pytest

from looped_jax.data import builtin_corpus
from looped_jax.errors import DataError
from tests.corpora import open_corpus


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return open_corpus("builtin", cache), cache


def test_builtin_corpus_is_real_text_in_small_row_groups(builtin):
    found, _ = builtin
    assert len(found.train) == 8 and [f.name for f in found.val] == ["shard_val.parquet"]
    sizes = {}
    for path in [file.path for file in (*found.train, *found.val)]:
        file = pq.ParquetFile(path)
        assert file.schema_arrow.names == ["text"]
        assert all(file.metadata.row_group(i).num_rows <= 64 for i in range(file.num_row_groups))
        sizes[path.name] = sum(map(len, file.read()["text"].to_pylist()))
    total = sum(sizes.values())
    assert total > 5e6 and 0.01 < sizes["shard_val.parquet"] / total < 0.2


def test_validation_shares_no_module_with_training(builtin):
    found, _ = builtin
    *train, val = (
        set(pq.read_table(file.path)["text"].to_pylist()) for file in (*found.train, *found.val)
    )
    for texts in train:
        assert not {text for text in texts & val if len(text) > 1000}


def test_builtin_corpus_is_the_same_when_built_again(builtin, tmp_path):
    found, cache = builtin
    again = open_corpus("builtin", cache=tmp_path)
    assert again.fingerprint() == found.fingerprint()
    for ours, theirs in zip((*again.train, *again.val), (*found.train, *found.val), strict=True):
        assert ours.path.read_bytes() == theirs.path.read_bytes()
    before = found.val[0].path.stat().st_mtime_ns
    assert (
        open_corpus("builtin", cache=cache).val[0].path.stat().st_mtime_ns == before
    )  # built once


def test_builtin_corpus_leaves_out_what_differs_between_machines():
    names = {name for name, _ in builtin_corpus._modules()}
    assert {"ast", "json.decoder", "asyncio.tasks"} <= names
    assert all(part.isidentifier() for name in names for part in name.split("."))
    parts = {part for name in names for part in name.split(".")}
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "pytest"}
    assert not any(part.startswith("_sysconfigdata") for part in parts)


def test_builtin_corpus_appears_whole_or_not_at_all(monkeypatch, tmp_path):
    def killed(*_, **__):
        raise KeyboardInterrupt

    found = builtin_corpus._modules()
    few = list(itertools.islice(found, 100))
    few.append(next(each for each in found if builtin_corpus.validates(each[0])))
    monkeypatch.setattr(builtin_corpus, "_modules", lambda: few)
    monkeypatch.setattr(pq, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        builtin_corpus.build_builtin(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_python_without_sources_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin_corpus.sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    with pytest.raises(DataError, match="library, but .*lib holds too few; install .* or give"):
        builtin_corpus.build_builtin(tmp_path / "cache")
