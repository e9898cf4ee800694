"""Which files make a corpus, and what is said about files that cannot."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from looped_jax.data import corpus, document_files
from looped_jax.errors import DataError
from looped_jax.files import default_cache_dir
from tests.corpora import open_corpus

FINEWEB = Path(__file__).parents[2] / ".." / "shared" / "data" / "fineweb_edu" / "base_data"


def shard(path, texts=("one", "two"), column="text", **options):
    pq.write_table(pa.table({column: list(texts)}), path, **options)
    return path


def opened(folder, **settings):
    return open_corpus(folder, settings.pop("cache_dir", folder), **settings)


def test_last_shard_by_name_validates_unless_named(tmp_path):
    for name in "cab":
        shard(tmp_path / f"{name}.parquet")
    (tmp_path / "d.parquet.part").write_text("half a download")
    found = opened(tmp_path)
    assert [p.name for p in found.train] == ["a.parquet", "b.parquet"]
    assert [p.name for p in found.val] == ["c.parquet"]
    named = opened(tmp_path, val_shard="a.parquet", train_shards=1)
    assert [p.name for p in named.train] == ["b.parquet"] and named.val[0].name == "a.parquet"


def test_identity_tells_other_text_apart(tmp_path):
    for folder, text in (("x", "two"), ("y", "two"), ("z", "other words")):
        (tmp_path / folder).mkdir()
        for name in "ab":
            shard(tmp_path / folder / f"{name}.parquet", ["one", text])
    x, y, z = (opened(tmp_path / folder).fingerprint() for folder in "xyz")
    assert x == y != z


def test_identity_tells_texts_of_equal_length_apart(tmp_path):
    for name, text in (("a", "abcd"), ("b", "abce")):
        shard(tmp_path / f"{name}.parquet", ["x", text])
    found = opened(tmp_path).fingerprint()
    a, b = found["train"][0] | {"name": "b.parquet"}, found["val"]
    assert a["bytes"] == b["bytes"] and (b["rows"], b["row_groups"]) == (2, 1)
    assert a != b


def damaged(folder):
    (folder / "a.parquet").write_bytes(shard(folder / "a.parquet").read_bytes()[:-30])


def no_bytes(folder):
    (folder / "a.parquet").write_bytes(b"")


def other_column(folder):
    shard(folder / "a.parquet", column="content")


def numbers(folder):
    shard(folder / "a.parquet", [1, 2])


def no_rows(folder):
    table = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(table, folder / "a.parquet")


def empty_texts(folder):
    shard(folder / "a.parquet", ["", None])


def no_unicode(folder):
    ends = pa.py_buffer(np.array([0, 2, 4], np.int32).tobytes())
    texts = pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"\xff\xfeab")])
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "a.parquet is damaged"),
        (no_bytes, "a.parquet is damaged"),
        (other_column, "a.parquet has no column `text`, only content"),
        (numbers, "a.parquet: column `text` is of type int64, not string"),
        (no_rows, "a.parquet has no rows"),
        (empty_texts, "a.parquet: column `text` is empty"),
        (no_unicode, "a.parquet is damaged ('utf-8' codec can't decode"),
    ],
)
def test_a_bad_shard_is_named(tmp_path, spoil, message):
    shard(tmp_path / "b.parquet")
    spoil(tmp_path)
    with pytest.raises(DataError) as error:
        opened(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_shard_may_begin_with_empty_row_groups(tmp_path):
    for name in "ab":
        shard(tmp_path / f"{name}.parquet", [None, "", "text"], row_group_size=1)
    found = opened(tmp_path)
    groups = corpus.RowGroups(found.train)
    assert [groups[i] for i in range(len(groups))] == [[], [], ["text"]]


def test_damage_inside_a_row_group_is_named(tmp_path):
    path = shard(tmp_path / "a.parquet", ["x" * 50_000] * 40, row_group_size=10, compression=None)
    content = bytearray(path.read_bytes())
    content[20:200] = b"\xff" * 180
    path.write_bytes(content)
    with pytest.raises(DataError, match="a.parquet: row group 0 is damaged"):
        corpus.RowGroups([document_files.ParquetFile(path)])[0]


def test_missing_folders_and_shards_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no folder or file .*absent; .*download, or use"):
        opened(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no .*parquet, .*jsonl or .*txt file"):
        opened(tmp_path)
    for name in "ab":
        shard(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="1 files to train on .* but 5 .* lower data.train_shards"):
        opened(tmp_path, train_shards=5)
    with pytest.raises(DataError, match="data.val_shard: .* holds no c.parquet"):
        opened(tmp_path, val_shard="c.parquet")


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("LOOPED_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "looped_jax"


@pytest.mark.skipif(not FINEWEB.is_dir(), reason="needs shared/data beside the project")
def test_real_fineweb_shards_open():
    found = opened(FINEWEB)
    assert [p.name for p in found.train] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert [p.name for p in found.val] == ["shard_00002.parquet"]
