"""Plain text and JSON lines: cut where they should be, nothing lost, damage named."""

import json
import pickle
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from looped_jax.data import text_files
from looped_jax.data.corpus import KINDS, RowGroups
from looped_jax.data.document_files import ParquetFile, Share
from looped_jax.data.text_files import JSONLinesFile, TextFile
from looped_jax.errors import DataError
from tests.corpora import open_corpus


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_groups(monkeypatch):
    """Files of a few kB have many row groups, read in many blocks."""
    for name, size in {"GROUP": 700, "_SEARCHED": 500, "_BLOCK": 300}.items():
        monkeypatch.setattr(text_files, name, size)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def documents(file):
    return [text for group in range(len(file)) for text in file[group]]


def paragraphs(count, size):
    return [f"paragraph {i} {'abc é ' * size}"[:size] for i in range(count)]


def test_documents_end_at_the_first_blank_line_after_2000_characters(tmp_path):
    text = "\n\n".join(paragraphs(40, 300))
    found = documents(TextFile(written(tmp_path / "a.txt", text)))
    assert "".join(found) == text and len(found) > 3
    assert all(2_000 <= len(each) <= 2_400 and each.endswith("\n\n") for each in found[:-1])


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("gap", ["", "  \t"])
def test_blank_lines_are_found_whatever_they_are_made_of(tmp_path, line_end, gap):
    text = f"{line_end}{gap}{line_end}".join(paragraphs(20, 900))
    found = documents(TextFile(written(tmp_path / "a.txt", text)))
    assert "".join(found) == text and [each.count("paragraph") for each in found] == [3] * 6 + [2]


@pytest.mark.parametrize(
    ("text", "ends"),
    [("é" * 50_000, "é"), ("line é\n" * 9_000, "\n"), ("a " * 9_000 + "\n\nend", " ")],
)
def test_text_without_blank_lines_is_cut_all_the_same(tmp_path, text, ends):
    found = documents(TextFile(written(tmp_path / "a.txt", text)))
    assert "".join(found) == text
    assert max(map(len, found)) <= text_files.LONGEST
    assert found[0].endswith(ends) or len(found) == 2


def test_row_groups_lose_nothing_wherever_blocks_and_groups_end(tmp_path, small_groups):
    parts = paragraphs(40, 333)
    text = "\n\n".join(parts[:20]) + "\n" + "日本語" * 900 + "\n".join(parts[20:]) + "\n \né"
    file = TextFile(written(tmp_path / "a.txt", text))
    assert len(file) > 10 and "".join(documents(file)) == text
    sizes = [sum(len(each.encode()) for each in file[group]) for group in range(len(file))]
    assert max(sizes) <= 1200 and file.size() == len(text.encode()) == sum(sizes)


def test_marker_lines_end_documents_and_are_part_of_none(tmp_path, small_groups):
    stories = [f"Story {i}.\n\nIt ends, {'well ' * (i % 60)}.\n" for i in range(50)]
    text = "<|endoftext|>\n".join(stories) + "<|endoftext|>"
    file = TextFile(written(tmp_path / "a.txt", text))
    assert len(file) > 5 and documents(file) == stories
    inside = TextFile(written(tmp_path / "b.txt", "It says <|endoftext|> here.\n"))
    assert documents(inside) == ["It says <|endoftext|> here.\n"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert documents(TextFile(written(tmp_path / "a.txt", "\ufeffHello\n"))) == ["Hello\n"]
    lines = JSONLinesFile(written(tmp_path / "a.jsonl", '\ufeff{"text": "Hello"}'))
    assert documents(lines) == ["Hello"]


def test_json_lines_are_one_document_each(tmp_path, small_groups):
    texts = [f"document {i} é\n\n" + "word " * (i % 70) for i in range(80)] + ["x" * 5_000]
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=i % 2 == 0) + "\n"
             for i, text in enumerate(texts)]  # fmt: skip
    lines[3:3] = ["\n", '{"text": null}\n', '{"text": ""}\r\n']
    file = JSONLinesFile(written(tmp_path / "a.jsonl", "".join(lines).rstrip("\n")))
    assert len(file) > 10 and documents(file) == texts
    assert file.describe()["documents"] == len(texts)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("a.txt", b"caf\xe9\n", "a.txt, line 101: byte 0xe9 is no UTF-8; convert"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl, line 101: byte 0xe9 is no UTF-8"),
        ("a.jsonl", b'{"text": "cut\n', "a.jsonl, line 101 is no JSON"),
        ("a.jsonl", b'{"content": "x", "id": 1}\n', "101 has no field `text`, only content, id"),
        ("a.jsonl", b'["x"]\n', "a.jsonl, line 101 has no field `text`"),
        ("a.jsonl", b'{"text": 7}\n', "line 101: `text` is of type int, not string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 101: `text` has half a character"),
    ],
)  # fmt: skip
def test_damage_anywhere_is_named_by_line_when_the_file_is_opened(
    tmp_path, small_groups, name, bad, message
):
    kind, line = KINDS["." + name[2:]], b'{"text": "good"}\n'
    content = line * 100 + bad + line * 100
    with pytest.raises(DataError) as error:
        kind(written(tmp_path / name, content)).check()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [TextFile, JSONLinesFile])
@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_a_file_without_text_is_named(tmp_path, kind, content):
    with pytest.raises(DataError, match="a.any holds no text; give another"):
        kind(written(tmp_path / "a.any", content)).check()


def test_a_file_is_read_through_once_and_again_when_it_changes(tmp_path, cache, monkeypatch):
    path = written(tmp_path / "a.txt", "one\n\n" * 3_000)
    first = TextFile(path).describe()
    monkeypatch.setattr(TextFile, "_documents", None)  # a second pass would need it
    assert TextFile(path).describe() == first
    monkeypatch.undo()
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(cache))
    written(path, "two\n\n" * 3_000)
    second = TextFile(path).describe()
    assert first["bytes"] == second["bytes"] and first["sha256"] != second["sha256"]


def test_without_a_cache_to_write_to_it_works_too(tmp_path, cache):
    written(cache, "a file where the folder should be")
    assert documents(TextFile(written(tmp_path / "a.txt", "text"))) == ["text"]


def test_a_file_that_changes_in_use_is_named(tmp_path):
    file = TextFile(written(tmp_path / "a.txt", "one\n\ntwo"))
    assert len(file) == 1
    written(tmp_path / "a.txt", "one")
    with pytest.raises(DataError, match="a.txt has changed while it was in use"):
        file[0]


def test_workers_get_places_not_text_and_read_only_what_they_need(tmp_path):
    file = TextFile(written(tmp_path / "a.txt", ("x" * 70 + "\n\n") * 60_000))
    assert len(file) == 33
    copy = pickle.dumps(file)
    assert len(copy) < 3_000
    tracemalloc.start()
    texts = pickle.loads(copy)[20]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == file[20] and peak < 2_000_000 < file.size()


def kept(kind, path, **settings):
    return [documents(kind(path, Share(0.3, validates=v))) for v in (True, False)]


def test_a_share_of_documents_validates_and_none_is_in_both(tmp_path):
    texts = [f"document {i}" for i in range(400)] * 2
    lines = written(tmp_path / "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=32)
    val, train = kept(JSONLinesFile, lines)
    assert sorted(val + train) == sorted(texts) and not {*val} & {*train}
    assert 0.24 < len(val) / len(texts) < 0.36
    assert kept(ParquetFile, tmp_path / "a.parquet") == [val, train]  # whatever the file's kind


def test_more_text_moves_no_document_between_training_and_validation(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) + "\n" for i in range(200)]
    few = kept(JSONLinesFile, written(tmp_path / "a.jsonl", "".join(lines[:100])))
    more = kept(JSONLinesFile, written(tmp_path / "b.jsonl", "".join(lines)))
    assert all({*a} < {*b} for a, b in zip(few, more, strict=True))


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.0, "val_share=0.0 leaves no document .* validate; raise it"),
        (1.0, "val_share=1.0 leaves no document .* train on; lower it"),
    ],
)
def test_a_share_without_documents_is_named(tmp_path, share, message):
    path = written(tmp_path / "a.txt", "text")
    with pytest.raises(DataError, match=message):
        open_corpus(path, val_share=share)


def test_of_many_small_files_each_may_lie_in_one_share_alone(tmp_path):
    for n in range(12):
        written(tmp_path / f"{n:02}.txt", f"the only document, number {n}")
    corpus = open_corpus(tmp_path, val_share=0.3)
    train, val = (
        [text for group in range(len(groups)) for text in groups[group]]
        for groups in (RowGroups(corpus.train), RowGroups(corpus.val))
    )
    assert train and val and len(train) + len(val) == 12 and not {*train} & {*val}


def test_what_lies_beside_parquet_shards_is_no_text_of_theirs(tmp_path, capsys):
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": ["text"]}), tmp_path / f"{name}.parquet")
    written(tmp_path / "urls.txt", "https://localhost/a")
    corpus = open_corpus(tmp_path)
    assert [file.name for file in (*corpus.train, *corpus.val)] == ["a.parquet", "b.parquet"]
    assert "left out: urls.txt" in capsys.readouterr().out


def test_two_shares_of_a_file_are_told_apart(tmp_path):
    path = written(tmp_path / "a.txt", "text")
    whole, train, val = (
        TextFile(path, s).describe() for s in (None, Share(0.1, False), Share(0.1, True))
    )
    assert whole == {k: v for k, v in train.items() if k != "share"}
    assert (train["share"], val["share"]) == (0.9, 0.1)
