"""Downloads from a local server that misbehaves in every way that servers do."""

import hashlib
import threading
import zipfile

import pytest

from looped_jax.data.fetch import fetch, fetch_bundle, unpack_zip
from looped_jax.errors import DataError
from tests.data.faulty_server import CONTENT

QUICK = {"backoff": 0.01, "timeout": 0.5, "retries": 3}


@pytest.mark.parametrize(
    "script",
    [[], ["cut"], ["cut", "cut", "no ranges"], ["stall"], [500, 503], ["redirect"], [429]],
)
def test_arrives_whole_whatever_happens(server, tmp_path, script):
    server.script = list(script)
    seen = []
    path = fetch(server.url, tmp_path / "sub" / "file", progress=lambda *a: seen.append(a), **QUICK)
    assert path.read_bytes() == CONTENT and seen[-1] == (len(CONTENT), len(CONTENT))
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_goes_on_where_it_was_cut(server, tmp_path):
    server.script = ["cut"]
    fetch(server.url, tmp_path / "file", **QUICK)
    assert server.asked == [None, "bytes=300000-"]


def test_a_later_call_goes_on_and_one_after_that_asks_nothing(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:5000])
    assert fetch(server.url, tmp_path / "file", **QUICK).read_bytes() == CONTENT
    assert server.asked == ["bytes=5000-"]
    fetch(server.url, tmp_path / "file", **QUICK)
    assert len(server.asked) == 1


def test_a_part_that_is_too_long_is_started_anew(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * (len(CONTENT) + 5))
    assert fetch(server.url, tmp_path / "file", **QUICK).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ([404], {}, "answered 404"),
        ([500] * 9, {}, "failed 4 times .500"),
        (["cut"] * 3 + [500] * 9, {}, "failed 4 times"),
        ([], {"size": 17}, "holds 1024000 bytes, not 17"),
        ([], {"sha256": "0" * 64}, "has SHA-256 .* not 0000"),
    ],
)
def test_what_cannot_be_had_is_named_and_leaves_no_file(
    server, tmp_path, script, settings, message
):
    server.script = list(script)
    with pytest.raises(DataError, match=message) as error:
        fetch(server.url, tmp_path / "file", **QUICK, **settings)
    assert server.url in str(error.value) and not (tmp_path / "file").exists()


def test_a_right_hash_and_size_pass(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    fetch(server.url, tmp_path / "file", size=len(CONTENT), sha256=digest, **QUICK)


def test_two_at_once_download_once(server, tmp_path):
    threads = [
        threading.Thread(target=fetch, args=(server.url, tmp_path / "file"), kwargs=QUICK)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() == CONTENT and len(server.asked) == 1


def test_an_answer_of_unknown_length_is_taken_only_with_a_size(server, tmp_path):
    server.script = ["no length", "no length"]
    with pytest.raises(DataError, match="does not say how long it is"):
        fetch(server.url, tmp_path / "file", **QUICK)
    assert not (tmp_path / "file").exists()
    path = fetch(server.url, tmp_path / "file", size=len(CONTENT), **QUICK)
    assert path.read_bytes() == CONTENT


def test_what_is_no_url_is_named(tmp_path):
    with pytest.raises(DataError, match="'bundle' is no URL"):
        fetch("bundle", tmp_path / "file", **QUICK)


def test_nobody_listens(tmp_path):
    with pytest.raises(DataError, match="failed 4 times"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file", **QUICK)


def zipped(path, entries):
    with zipfile.ZipFile(path, "w") as file:
        for name, text in entries.items():
            file.writestr(name, text)
    return path


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil"])
def test_archives_that_lead_outside_are_refused(tmp_path, name):
    entry = zipfile.ZipInfo("placeholder")
    entry.filename = name  # as a hostile archive has it, not as the library would write it
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(entry, "x")
    with pytest.raises(DataError, match="leads out of its folder"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "out" / "in")
    assert not list(tmp_path.rglob("evil"))


def test_links_and_damage_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="is a link"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "out")
    whole = zipped(tmp_path / "b.zip", {"x": "y" * 5000}).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[:-40])
    with pytest.raises(DataError, match="no whole zip file"):
        unpack_zip(tmp_path / "b.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_stream_and_an_encrypted_entry_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x", bytes(range(256)) * 20)
        offset = file.start_dir
    whole = path.read_bytes()
    name_end = 30 + len("x")
    path.write_bytes(whole[:name_end] + b"\xff" + whole[name_end + 1 :])  # a block of no known kind
    with pytest.raises(DataError, match="no whole zip file"):
        unpack_zip(path, tmp_path / "out")
    flags = offset + 8  # in the central directory, which is what the reader believes
    path.write_bytes(whole[:flags] + b"\x01" + whole[flags + 1 :])
    with pytest.raises(DataError, match="'x' is encrypted"):
        unpack_zip(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bundle_is_downloaded_once_and_bad_ones_are_forgotten(server, tmp_path):
    good = zipped(tmp_path / "good.zip", {"eval_bundle/core.yaml": "x", "eval_bundle/a/b": "c"})
    bad = zipped(tmp_path / "bad.zip", {"readme": "x"})
    server.files = {"good": good.read_bytes(), "bad": bad.read_bytes()}
    base, folder = server.url.removesuffix("file"), tmp_path / "cache" / "eval_bundle"
    with pytest.raises(DataError, match="holds no core.yaml"):
        fetch_bundle(folder, base + "bad")
    assert fetch_bundle(folder, base + "good") == folder
    assert (folder / "a" / "b").read_text() == "c"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["eval_bundle"]
    fetch_bundle(folder, base + "good")
    assert len(server.asked) == 2


def test_a_part_of_another_version_is_not_continued(server, tmp_path):
    server.tag, server.script = '"first"', ["cut", 404]
    with pytest.raises(DataError, match="404"):
        fetch(server.url, tmp_path / "file", **QUICK)
    assert 0 < (tmp_path / "file.part").stat().st_size < len(CONTENT)
    server.tag, server.files["file"] = '"second"', CONTENT[::-1]
    assert fetch(server.url, tmp_path / "file", **QUICK).read_bytes() == CONTENT[::-1]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_part_of_the_same_version_is(server, tmp_path):
    server.tag, server.script = '"first"', ["cut"]
    assert fetch(server.url, tmp_path / "file", **QUICK).read_bytes() == CONTENT
    assert server.sent == len(CONTENT)


@pytest.mark.parametrize("settings", [{"size": 5}, {"sha256": "0" * 64}])
def test_a_file_that_is_there_is_checked_too(server, tmp_path, settings):
    (tmp_path / "file").write_bytes(b"something else")
    with pytest.raises(DataError, match="is there with .* remove it"):
        fetch(server.url, tmp_path / "file", **settings, **QUICK)
    assert (tmp_path / "file").read_bytes() == b"something else"


def test_a_full_disk_is_no_fault_of_the_server(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="cannot be written .No space left on device."):
        fetch(server.url, tmp_path / "file", **QUICK)
    assert len(server.asked) == 1  # nobody tried again


def test_a_token_is_not_carried_along_by_a_redirect(server, tmp_path):
    server.script = ["redirect"]
    fetch(server.url, tmp_path / "file", token="secret", **QUICK)
    first, second = (headers for _, headers in server.requests)
    assert first["Authorization"] == "Bearer secret" and "Authorization" not in second


def test_a_bundle_that_two_want_at_once_is_downloaded_once(server, tmp_path):
    good = zipped(
        tmp_path / "good.zip", {"eval_bundle/core.yaml": "x", "eval_bundle/b": "c" * 9000}
    )
    server.files, server.acts = {"good": good.read_bytes()}, {"good": ["slow"]}
    url, folder = server.url.removesuffix("file") + "good", tmp_path / "cache" / "eval_bundle"
    found, start = [], threading.Barrier(2)

    def want():
        start.wait()
        try:
            found.append((fetch_bundle(folder, url, **QUICK) / "b").read_text())
        except Exception as error:
            found.append(error)

    both = [threading.Thread(target=want) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert found == ["c" * 9000] * 2 and len(server.asked) == 1
    assert [p.name for p in folder.parent.iterdir()] == ["eval_bundle"]
