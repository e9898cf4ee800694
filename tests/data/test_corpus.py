"""Which files make a corpus, and what is said about files that cannot."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from looped_jax.config.settings import DataConfig
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


def tree(folder, *names):
    """Text files of these names, each with documents of its own."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            shard(path, [name, f"{name} again"])
        elif path.suffix == ".jsonl":
            path.write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(60)))
        else:
            path.write_text("".join(f"{name} {i} ".ljust(2_000, ".") + "\n\n" for i in range(60)))
    return folder


def purposes(found, folder):
    return [
        [file.path.relative_to(folder).as_posix() for file in each]
        for each in (found.train, found.val)
    ]


HUB = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        ([*HUB, "data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
         HUB, ["data/validation-00000-of-00001.parquet"]),
        (["train.txt", "valid.txt", "test.txt"], ["train.txt"], ["valid.txt"]),
        (["train/a.jsonl", "train/b.txt", "dev/c.txt", "test/d.txt", ".cache/e.txt"],
         ["train/a.jsonl", "train/b.txt"], ["dev/c.txt"]),
        (["a.txt", "b.jsonl", "c.parquet", "wiki.val.txt", "val-2.txt"],
         ["a.txt", "b.jsonl", "c.parquet"], ["val-2.txt", "wiki.val.txt"]),
        (["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"],
         ["TinyStoriesV2-GPT4-train.txt"], ["TinyStoriesV2-GPT4-valid.txt"]),
        (["train-0.txt", "train-1.txt", "test.txt"], ["train-0.txt"], ["train-1.txt"]),
        (["a.txt", "latest.txt", "contest.txt", "README.txt", "LICENSE.txt"],
         ["a.txt", "contest.txt"], ["latest.txt"]),
        (["a.parquet", "b.parquet", "old/val.parquet"], ["a.parquet"], ["b.parquet"]),
    ],
)  # fmt: skip
def test_names_say_what_files_are_for(tmp_path, names, train, val):
    folder = tree(tmp_path / "test set", *names)  # the corpus's own name says nothing
    assert purposes(opened(folder, cache_dir=tmp_path), folder) == [train, val]


def test_what_is_left_out_is_said(tmp_path, capsys):
    tree(tmp_path / "x", "train.txt", "val.txt", "test-1.txt", "test-2.txt")
    opened(tmp_path / "x", cache_dir=tmp_path)
    assert capsys.readouterr().out == "data.path: not trained on: test-1.txt and 1 more\n"


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["test.txt"], {}, "holds only test.txt, by its name for tests, which is never trained on"),
        (
            ["val.txt"],
            {},
            "holds 0 files to train on beside val.txt .* but 1 are needed",
        ),
        (["a.txt", "val.txt"], {"val_share": 0.1}, "val_share=0.1: .* has val.txt for validation"),
        (["a.txt", "b.txt"], {"val_share": 0.1, "val_shard": "b.txt"}, "has b.txt for validation"),
        (["a.csv"], {}, "holds no .*parquet, .*jsonl, .*txt or .*bin f"),
    ],
)
def test_folders_that_make_no_corpus_are_named(tmp_path, names, settings, message):
    folder = tree(tmp_path / "x", *names)
    with pytest.raises(DataError, match=message):
        opened(folder, cache_dir=tmp_path, **settings)


@pytest.mark.parametrize("name", ["notes.txt", "notes.jsonl", "test.parquet"])
def test_one_file_is_a_corpus_and_gives_a_share_for_validation(tmp_path, name, monkeypatch):
    shard(tmp_path / name, [f"document {i}" for i in range(99)]) if "parq" in name else tree(
        tmp_path, name
    )
    found = opened(tmp_path / name, cache_dir=tmp_path)
    train, val = (
        [text for g in range(len(file)) for text in file[g]] for file in (*found.train, *found.val)
    )
    assert 0 < len(val) < len(train) and not {*train} & {*val}
    assert opened(tmp_path / name, cache_dir=tmp_path).fingerprint() == found.fingerprint()
    other = opened(tmp_path / name, cache_dir=tmp_path, val_share=0.5)
    assert other.fingerprint() != found.fingerprint()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_corpus(f"~/{name}", tmp_path).fingerprint() == found.fingerprint()
    with pytest.raises(DataError, match="val_shard: .* holds no x.txt; choose .* such as"):
        opened(tmp_path / name, cache_dir=tmp_path, val_shard="x.txt")


def test_a_share_of_several_files_can_be_asked_for(tmp_path):
    tree(tmp_path / "x", "a.txt", "b.jsonl", "test.txt")
    found = opened(tmp_path / "x", cache_dir=tmp_path, val_share=0.2)
    assert purposes(found, tmp_path / "x") == [["a.txt", "b.jsonl"]] * 2
    assert found.val[0].share.validates and not found.train[0].share.validates


def test_a_file_of_another_kind_is_plain_text_or_named(tmp_path):
    (tmp_path / "a.md").write_text("\n\n".join(f"word {i} " * 300 for i in range(99)))
    assert opened(tmp_path / "a.md", cache_dir=tmp_path).val[0][0][0].startswith("word ")
    (tmp_path / "a.csv").write_text("text")
    with pytest.raises(DataError, match="a.csv is none of .*parquet, .*txt or .*bin; convert it"):
        opened(tmp_path / "a.csv", cache_dir=tmp_path)


def to_judge(folder, path=None, **settings):
    return corpus.Corpus.to_judge(DataConfig(path=str(folder), **settings), path and str(path))


def test_a_model_is_judged_without_the_files_that_it_was_trained_on(tmp_path):
    tree(tmp_path / "x", "v.parquet")
    found = to_judge(tmp_path / "x", val_shard="v.parquet", train_shards=249)
    assert purposes(found, tmp_path / "x") == [[], ["v.parquet"]]
    with pytest.raises(DataError, match="0 files to train on beside v.parquet"):
        opened(tmp_path / "x", val_shard="v.parquet")
    tree(tmp_path / "x", "a.parquet")
    with pytest.raises(DataError, match="holds 1 of the 249 files .* cannot be told; .* FILE"):
        to_judge(tmp_path / "x", train_shards=249)
    tree(tmp_path / "y", "train-0.parquet", "validation-0.parquet")
    found = to_judge(tmp_path / "y", train_shards=249)
    assert purposes(found, tmp_path / "y") == [["train-0.parquet"], ["validation-0.parquet"]]


def test_a_model_is_judged_on_the_share_that_it_was_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path))
    tree(tmp_path, "a.txt")
    own = to_judge(tmp_path / "a.txt")
    assert own == opened(tmp_path / "a.txt", cache_dir=tmp_path) and own.val[0].share.validates


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "test.parquet"])
def test_a_model_is_judged_on_all_of_another_file(tmp_path, monkeypatch, name):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path))
    tree(tmp_path / "own", "x.txt", "y.txt")
    tree(tmp_path / "other", name)
    for path in (tmp_path / "other" / name, tmp_path / "other"):
        if path.is_dir() and name == "test.parquet":
            continue  # of a folder, that file is not what it is for
        settings = {"train_shards": 249, "val_shard": "gone.parquet"}
        found = to_judge(tmp_path / "own", path, **settings)
        assert found.train == () and [f.name for f in found.val] == [name]
        assert found.val[0].share is None


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


def test_a_large_row_group_is_read_in_parts_and_never_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(document_files, "_PART", size := 4 << 20)
    texts = [f"{i} ".ljust(4_096, "x") for i in range(5_000)]
    made = {"use_dictionary": False, "compression": None, "data_page_size": 1 << 16}
    file = document_files.ParquetFile(shard(tmp_path / "a.parquet", texts, **made))
    parts = [file[i] for i in range(len(file))]
    assert pq.read_metadata(file.path).num_row_groups == 1 and file.describe()["row_groups"] == 5
    assert [text for part in parts for text in part] == texts
    assert max(sum(map(len, part)) for part in parts) <= size
    with document_files._open(file.path) as opened_file:
        before = pa.total_allocated_bytes()
        read = document_files._texts(opened_file, 0)
        held = max(pa.total_allocated_bytes() - before for _ in read)
    assert 0 < held < file.size() / 2


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (1, 3), (3, 0, 1, 4)])
def test_parts_of_a_row_group_are_decoded_once_in_their_order(tmp_path, monkeypatch, order):
    monkeypatch.setattr(document_files, "_PART", 40_000)
    texts = [f"{i} ".ljust(4_096, "x") for i in range(40)]
    file = document_files.ParquetFile(shard(tmp_path / "a.parquet", texts, use_dictionary=False))
    opened, own = [], document_files._open
    monkeypatch.setattr(document_files, "_open", lambda path: opened.append(path) or own(path))
    assert len(file) == 5
    for part in order:
        assert file[part] == texts[8 * part : 8 * part + 8]
    assert len(opened) == 1 + (order == (3, 0, 1, 4))  # one goes back
    document_files._leave()


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
    with pytest.raises(DataError, match="holds no .*parquet, .*jsonl, .*txt or .*bin f"):
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
