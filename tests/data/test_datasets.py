"""Data sets by name, from a local hub: listed, checked, whole, and fit for what is said of them."""

import dataclasses
import hashlib
import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from looped_jax.data import datasets, openwebtext
from looped_jax.data.corpus import RowGroups
from looped_jax.data.datasets import DATASETS, check_token_shard
from looped_jax.data.download import main
from looped_jax.errors import DataError
from tests.corpora import load_tokenizer, open_corpus


def parquet(texts):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, row_group_size=7)
    return buffer.getvalue()


def tokens(count, header=(20240520, 1)):
    first = np.zeros(256, "<i4")
    first[:3] = [*header, count]
    return first.tobytes() + np.arange(count, dtype="<u2").tobytes()


@pytest.fixture
def hub(server):
    """A hub that lists and holds what is put into it, by repository."""
    server.endpoint = server.url.rpartition("/")[0]

    def hold(folder, contents, **wrong):
        entries = [{"type": "directory", "path": f"{folder}/more", "size": 0}]
        for name, content in {**contents, "README.md": b"x"}.items():
            found = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} | wrong
            entries.append(
                {"type": "file", "path": f"{folder}/{name}".lstrip("/"), "size": found["size"],
                 "lfs": {"oid": found["sha256"], "size": found["size"]}}
            )  # fmt: skip
            server.files[name] = content
        server.files[folder or "main"] = json.dumps(entries).encode()

    server.hold = hold
    return server


def download(hub, folder, *arguments):
    main([*arguments, f"--out={folder}", f"--endpoint={hub.endpoint}", "--retries=0"])


def names(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_shakespeare_comes_whole_or_not_at_all(server, tmp_path, monkeypatch, capsys):
    play = "".join(f"Player {i}: all the world's a stage.\n\n" for i in range(9_000)).encode()
    file = datasets.RemoteFile("input.txt", server.url, len(play), hashlib.sha256(play).hexdigest())
    named = dataclasses.replace(DATASETS["shakespeare"], files=(file,))
    monkeypatch.setitem(DATASETS, "shakespeare", named)
    server.files["file"] = play[:-1] + b"?"
    with pytest.raises(SystemExit):
        main(["shakespeare", f"--out={tmp_path / 'x'}", "--retries=0"])
    assert "has SHA-256" in capsys.readouterr().err and not names(tmp_path)
    server.files["file"], server.acts = play, {"file": ["cut"]}
    main(["shakespeare", f"--out={tmp_path / 'x'}"])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"shakespeare: --config.data.path={tmp_path / 'x'}"
    found = open_corpus(tmp_path / "x", tmp_path)
    train, val = ("".join(texts(part)) for part in (found.train, found.val))
    assert (train + val).encode() == play and len(train) == int(0.9 * len(play))


def test_the_table_knows_shakespeare_as_it_is():
    path = Path(__file__).parents[3] / "shared/data/tinyshakespeare/input.txt"
    if not path.is_file():
        pytest.skip("needs shared/data beside the project")
    (file,) = DATASETS["shakespeare"].files
    content = path.read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size, file.sha256)


def test_shakespeare_in_characters_is_nanogpts_token_for_token(tmp_path):
    path = Path(__file__).parents[3] / "shared/data/tinyshakespeare/input.txt"
    if not path.is_file():
        pytest.skip("needs shared/data beside the project")
    (tmp_path / "input.txt").write_bytes(path.read_bytes())
    datasets.cut_shakespeare(tmp_path)
    found = open_corpus(tmp_path, tmp_path)
    words = load_tokenizer(found, tmp_path, "characters")
    assert words.vocab_size == 65
    ids = [np.concatenate(words.encode_documents(texts(part))) for part in (found.train, found.val)]
    assert [len(part) for part in ids] == [1_003_854, 111_540]  # as its readme has them
    characters = sorted(set(path.read_text()))
    wanted = [characters.index(each) for each in path.read_text()]
    np.testing.assert_array_equal(np.concatenate(ids), wanted)


STORIES = {
    "train-00000-of-00002-2d.parquet": parquet([f"story {i}" for i in range(30)]),
    "train-00001-of-00002-58.parquet": parquet([f"tale {i}" for i in range(30)]),
    "validation-00000-of-00001-86.parquet": parquet(["another"]),
}


def test_a_data_set_of_the_hub_is_trained_on_as_it_came(hub, tmp_path, capsys):
    hub.hold("data", STORIES)
    folder = tmp_path / "stories"
    download(hub, folder, "tinystories")
    assert hub.requests[0][0] == "/api/datasets/roneneldan/TinyStories/tree/main/data"
    paths = {path for path, _ in hub.requests}
    assert f"/datasets/roneneldan/TinyStories/resolve/main/data/{[*STORIES][0]}" in paths
    assert names(folder) == sorted(STORIES)
    assert f"tinystories: --config.data.path={folder}" in capsys.readouterr().out
    found = open_corpus(folder, tmp_path)
    assert [f.name for f in (*found.train, *found.val)] == sorted(STORIES)


@pytest.mark.parametrize(
    ("wrong", "words"), [({"size": 5}, "bytes, not 5"), ({"sha256": "0" * 64}, "not 0000")]
)
def test_what_is_not_as_the_hub_lists_it_is_not_kept(hub, tmp_path, capsys, wrong, words):
    hub.hold("data", STORIES, **wrong)
    with pytest.raises(SystemExit):
        download(hub, tmp_path / "x", "tinystories")
    said = capsys.readouterr()
    assert words in said.err and "3 of 3 files are missing" in said.err
    assert not [name for name in names(tmp_path) if name.endswith(".parquet")]


def test_a_data_set_that_the_hub_does_not_have_is_named(hub, tmp_path):
    hub.acts = {"data": [404]}
    with pytest.raises(DataError, match="tree/main/data answered 404"):
        DATASETS["tinystories"].remote_files(tmp_path / "list", endpoint=hub.endpoint)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"<html>", "is no list of files; check --endpoint"),
        (b'[{"type": "file"}]', "is no list of files"),
        (b"{}", "lists no .*parquet"),
        (b"[7]", "is no list of files"),
        (b"[]", "lists no .*parquet; the data set has moved"),
        (json.dumps([{"type": "directory", "path": "x"}] * 1000).encode(), "only the first 1000"),
    ],
)
def test_a_list_that_is_none_is_named(hub, tmp_path, answer, words):
    hub.files["data"] = answer
    with pytest.raises(DataError, match=words):
        DATASETS["tinystories"].remote_files(tmp_path / "list", endpoint=hub.endpoint)
    assert not names(tmp_path)


def test_token_shards_are_checked_and_may_be_a_part(hub, tmp_path, capsys):
    shards = {f"fineweb_train_{i:06d}.bin": tokens(500 + i) for i in (1, 2, 3)}
    hub.hold("", {**shards, "fineweb_val_000000.bin": tokens(99)})
    download(hub, tmp_path / "x", "fineweb10b-gpt2", "--shards=3")
    assert names(tmp_path / "x") == [
        "fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin",
    ]  # fmt: skip
    said = capsys.readouterr().out.splitlines()[-1]
    assert len(open_corpus(said.partition("path=")[2], tmp_path).train) == 2
    for bad in (tokens(9, header=(7, 1)), tokens(9)[:-1], b""):
        (tmp_path / "bad.bin").write_bytes(bad)
        with pytest.raises(DataError, match="bad.bin (begins with 7|holds 9 tokens|has 0 bytes)"):
            check_token_shard(tmp_path / "bad.bin")


def test_wikitext_and_the_core_bundle_are_where_evaluate_is_told(hub, tmp_path, capsys):
    files = {f"{part}-00000-of-00001.parquet": parquet([" = A = \n"]) for part in ("test", "train")}
    hub.hold("wikitext-2-v1", files)
    download(hub, tmp_path / "w", "wikitext-2")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"wikitext-2: --wikitext {tmp_path / 'w'}/test-00000-of-00001.parquet"
    assert names(tmp_path / "w") == sorted(files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("eval_bundle/core.yaml", "x")
    hub.files["bundle.zip"] = buffer.getvalue()
    download(hub, tmp_path / "c", "core", f"--bundle_url={hub.endpoint}/bundle.zip")
    assert f"core: --bundle {tmp_path / 'c'}" in capsys.readouterr().out
    assert (tmp_path / "c" / "core.yaml").is_file()


# ---- OpenWebText ---------------------------------------------------------------------------------

PAGES = [f"page {i}" for i in range(6_100)]
WEB = {f"train-0000{n}-of-00003.parquet": parquet(PAGES[a:b])
       for n, (a, b) in enumerate([(0, 2_000), (2_000, 4_050), (4_050, 6_100)])}  # fmt: skip


def texts(files):
    groups = RowGroups(files)
    return [text for i in range(len(groups)) for text in groups[i]]


def split_is_right(folder, cache):
    found = open_corpus(folder, cache)
    train, val = texts(found.train), texts(found.val)
    # as datasets.Dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]
    drawn = np.random.default_rng(2357).permutation(len(PAGES))[: math.ceil(0.0005 * len(PAGES))]
    assert val == [PAGES[i] for i in drawn] and len(val) == 4
    assert train == [page for page in PAGES if page not in val]


def test_openwebtext_is_split_as_nanogpt_does(hub, tmp_path, capsys):
    hub.hold("plain_text", WEB)
    download(hub, tmp_path / "web", "openwebtext")
    split_is_right(tmp_path / "web", tmp_path)
    assert names(tmp_path / "web") == sorted([*WEB, "rows.json", "validation.parquet"])
    asked = len(hub.requests)
    download(hub, tmp_path / "web", "openwebtext")
    assert len(hub.requests) == asked + 1  # the list alone
    assert len(openwebtext.held_out(8_013_769)) == 4_007  # as many as nanoGPT's val.bin is made of


@pytest.mark.parametrize("stopped_at", range(4))
def test_openwebtext_goes_on_where_it_was_stopped(hub, tmp_path, monkeypatch, stopped_at):
    hub.hold("plain_text", WEB)
    written, write = [], openwebtext._write

    def killed(path, tables):
        if len(written) == stopped_at:
            raise KeyboardInterrupt
        written.append(path)
        write(path, tables)

    with monkeypatch.context() as patch:
        patch.setattr(openwebtext, "_write", killed)
        with pytest.raises(SystemExit) as stopped:
            download(hub, tmp_path / "web", "openwebtext")
    assert stopped.value.code == 130
    download(hub, tmp_path / "web", "openwebtext")
    split_is_right(tmp_path / "web", tmp_path)
    asked = [path for path, _ in hub.requests if path.endswith(".parquet")]
    assert len(asked) == len(set(asked)) == len(WEB)  # nothing twice


# ---- the first documents -------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["cut", 500, "no ranges"])
def test_the_first_documents_come_from_as_few_files_as_hold_them(hub, tmp_path, capsys, act):
    hub.hold("plain_text", WEB)
    names_of_files = sorted(WEB)
    hub.acts = {names_of_files[0]: ["cut", act]}
    flags = ["openwebtext", f"--out={tmp_path / 'web'}", f"--endpoint={hub.endpoint}"]
    main([*flags, "--documents=3000", "--retries=2"])
    path = tmp_path / "web" / "first_3000.parquet"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"openwebtext: --config.data.path={path}"
    assert names(tmp_path / "web") == ["first_3000.parquet"]
    assert pq.read_table(path)["text"].to_pylist() == PAGES[:3_000]
    assert not any(names_of_files[2] in asked for asked, _ in hub.requests)
    found = open_corpus(path, tmp_path)  # a share of which validates
    assert sorted(texts(found.train) + texts(found.val)) == sorted(PAGES[:3_000])
    assert 100 < len(texts(found.val)) < 200
    asked = len(hub.requests)
    main([*flags, "--documents=3000"])
    assert len(hub.requests) == asked + 1  # the list alone


def test_first_documents_go_on_where_they_were_stopped(hub, tmp_path, monkeypatch):
    stories = {f"train-0000{i}-of-00002.parquet": parquet(PAGES[a:b])
               for i, (a, b) in enumerate([(0, 500), (500, 900)])}  # fmt: skip
    hub.hold("data", {**stories, "validation-00000-of-00001.parquet": parquet(["another"])})
    with monkeypatch.context() as patch:
        patch.setattr(pq, "ParquetWriter", None)
        with pytest.raises(TypeError):
            download(hub, tmp_path / "s", "tinystories", "--documents=700")
    assert not (tmp_path / "s" / "first_700.parquet").exists()
    download(hub, tmp_path / "s", "tinystories", "--documents=700")
    assert pq.read_table(tmp_path / "s" / "first_700.parquet")["text"].to_pylist() == PAGES[:700]
    asked = [path for path, _ in hub.requests if path.endswith(".parquet")]
    assert len(asked) == 2 and not any("validation" in path for path in asked)  # nothing twice


def test_more_documents_than_there_are_and_files_that_are_not_as_listed_are_refused(
    hub, tmp_path, capsys
):
    hub.hold("data", STORIES)
    with pytest.raises(SystemExit):
        download(hub, tmp_path / "s", "tinystories", "--documents=61")
    assert "--documents=61: there are 60 in all" in capsys.readouterr().err
    hub.hold("data", STORIES, sha256="0" * 64)
    with pytest.raises(SystemExit):
        download(hub, tmp_path / "t", "tinystories", "--documents=3")
    assert "has SHA-256" in capsys.readouterr().err
    assert not [name for name in names(tmp_path / "t") if name.endswith(".parquet")]


def test_first_documents_of_fineweb_edu_are_those_of_its_first_shards(hub, tmp_path, monkeypatch):
    for index in range(2):
        hub.files[f"shard_0000{index}.parquet"] = parquet([f"{index} {i}" for i in range(50)])
    download(hub, tmp_path / "f", "fineweb-edu", "--documents=60")
    found = pq.read_table(tmp_path / "f" / "first_60.parquet")["text"].to_pylist()
    assert found == [f"{i // 50} {i % 50}" for i in range(60)]
    monkeypatch.chdir(tmp_path)
    main(["fineweb-edu", "--documents=60", f"--endpoint={hub.endpoint}", "--retries=0"])
    assert names(tmp_path / "data") == ["fineweb_edu_first/first_60.parquet"]  # not among shards


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tinystories", "--shards=3"], "tinystories comes whole"),
        (["fineweb-edu"], "give --shards, as 250"),
        (["shakespeare", "--documents=9"], "goes with fineweb-edu, tinystories or openwebtext"),
        (["fineweb-edu", "--documents=9", "--shards=3"], "leave --shards out"),
        (["fineweb10b-gpt2", "--shards=1"], "give 2 or more"),
        (["shakespeare", "--start_after=2", "--", "true"], "goes with fineweb-edu"),
        (["tinystories", "--dataset=me/mine"], "--dataset goes with fineweb-edu"),
        (["tinystories", "--bundle_url=https://x"], "--bundle_url goes with core"),
        (["shakespear"], "is no data set; choose"),
    ],
)
def test_names_and_flags_that_do_not_go_together_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_help_lists_every_data_set(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in (*DATASETS, "fineweb-edu", "core"))
