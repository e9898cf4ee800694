"""Shards and tokenizers from a local hub that misbehaves; the program killed and started again."""

import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from looped_jax.data.download import (
    LAST_SHARD,
    download_files,
    fineweb_edu,
    main,
    shard_name,
    tokenizer_path,
    wanted_shards,
)
from looped_jax.data.tokenizer import train_tokenizer
from looped_jax.errors import DataError
from tests.programs import ROOT

QUICK = {"backoff": 0.01, "timeout": 0.5, "retries": 3}


@pytest.fixture
def hub(server, tmp_path):
    """A hub with the first four shards and the last one."""
    for index in (0, 1, 2, 3, LAST_SHARD):
        table = pa.table({"text": [f"document {index} {i} " * 40 for i in range(400)]})
        pq.write_table(table, tmp_path / "made.parquet", compression="none")
        server.files[shard_name(index)] = (tmp_path / "made.parquet").read_bytes()
    server.endpoint = server.url.rpartition("/")[0]
    return server


def present(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_shard_validates_however_many_there_are():
    assert wanted_shards(3) == ["shard_01822.parquet", "shard_00000.parquet", "shard_00001.parquet"]
    assert wanted_shards(1823)[-1] == "shard_01821.parquet"
    for count in (1, 1824):
        with pytest.raises(DataError, match=f"--shards={count}: give 2"):
            wanted_shards(count)


@pytest.mark.parametrize("act", ["cut", "stall", 500, "wrong", "redirect", "no ranges"])
def test_shards_arrive_whole_whatever_happens_to_one(hub, tmp_path, act):
    hub.acts = {shard_name(1): [act], shard_name(LAST_SHARD): [act]}
    if act == "redirect":  # to the same file elsewhere
        hub.files["other"] = hub.files[shard_name(1)]
        hub.acts.pop(shard_name(LAST_SHARD))
    said = []
    wanted = fineweb_edu(4, endpoint=hub.endpoint)
    download_files(wanted, tmp_path / "out", parallel=3, log=said.append, **QUICK)
    assert present(tmp_path / "out") == sorted(wanted_shards(4))
    for name in wanted_shards(4):
        assert (tmp_path / "out" / name).read_bytes() == hub.files[name]
    assert said[-1].startswith("4/4 files")
    paths = {path for path, _ in hub.requests}
    assert f"/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/{shard_name(0)}" in paths


def test_a_shard_that_is_missing_is_named_and_the_others_stay(hub, tmp_path, capsys):
    hub.acts = {shard_name(1): [404]}
    with pytest.raises(SystemExit) as stopped:
        main(["--shards=4", f"--out={tmp_path / 'out'}", f"--endpoint={hub.endpoint}"])
    said = capsys.readouterr()
    assert stopped.value.code == 1
    assert "error: 1 of 4 files are missing" in said.err and shard_name(1) in said.err
    assert present(tmp_path / "out") == sorted(set(wanted_shards(4)) - {shard_name(1)})
    sent = hub.sent
    main(["--shards=4", f"--out={tmp_path / 'out'}", f"--endpoint={hub.endpoint}"])
    assert hub.sent - sent == len(hub.files[shard_name(1)])  # only that one
    assert "--config.data.val_shard=shard_01822.parquet --config.data.train_shards=3" in (
        capsys.readouterr().out
    )


def test_a_file_that_is_no_parquet_is_never_kept(hub, tmp_path):
    hub.acts = {shard_name(0): ["wrong"] * 9}
    wanted = fineweb_edu(3, endpoint=hub.endpoint)
    with pytest.raises(DataError, match="1 of 3 files are missing.*no whole parquet file"):
        download_files(wanted, tmp_path / "out", parallel=1, **QUICK)
    assert present(tmp_path / "out") == [shard_name(1), shard_name(LAST_SHARD)]


def program(hub, folder, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "looped_jax.data.download", "--shards=5", f"--out={folder}",
         "--parallel=2", *more],
        cwd=ROOT, env={**os.environ, "HF_ENDPOINT": hub.endpoint}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_killed_download_goes_on_with_what_is_missing(hub, tmp_path):
    hub.acts = {name: ["slow"] for name in wanted_shards(5)}
    running = program(hub, tmp_path / "out")
    deadline = time.monotonic() + 60
    while hub.sent < 300_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    parts = sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if ".lock" not in p.name)
    hub.wake.set()
    hub.wake.clear()
    time.sleep(0.2)  # connections that were open find that nobody listens
    hub.sent, hub.acts = 0, {}
    out, err = program(hub, tmp_path / "out").communicate(timeout=60)
    total = sum(len(hub.files[name]) for name in wanted_shards(5))
    assert 0 < parts < total and "5 shards: --config.data.path=" in out, err
    assert hub.sent == total - parts
    assert present(tmp_path / "out") == sorted(wanted_shards(5))


def test_a_command_starts_with_the_first_shards_and_its_code_is_ours(hub, tmp_path):
    hub.acts = {shard_name(3): ["slow"], shard_name(2): ["slow"]}
    look = "import os, sys; print(sorted(os.listdir(sys.argv[1]))); sys.exit(7)"
    running = program(
        hub, tmp_path / "out", "--start_after=2", "--", sys.executable, "-c", look,
        str(tmp_path / "out"),
    )  # fmt: skip
    out, err = running.communicate(timeout=60)
    assert running.returncode == 7, err
    seen = next(line for line in out.splitlines() if line.startswith("["))
    assert {shard_name(0), shard_name(1), shard_name(LAST_SHARD)} <= set(eval(seen))
    assert f"'{shard_name(3)}'" not in seen  # it had not waited for the last
    assert present(tmp_path / "out") == sorted(wanted_shards(5))


def test_a_tokenizer_comes_checked(hub, tmp_path, capsys, monkeypatch):
    train_tokenizer(iter(["hello world " * 50]), 280, path=tmp_path / "made.json")
    hub.files["tokenizer.json"] = (tmp_path / "made.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    main(["--tokenizer=Qwen/Qwen3-4B", f"--endpoint={hub.endpoint}"])
    assert "--config.data.tokenizer=data/qwen3/tokenizer.json" in capsys.readouterr().out
    assert hub.requests[0][0] == "/Qwen/Qwen3-4B/resolve/main/tokenizer.json"
    assert str(tokenizer_path("Qwen/Qwen3-4B")) == "data/qwen3/tokenizer.json"
    hub.files["tokenizer.json"] = b"{}"
    with pytest.raises(SystemExit):
        main(["--tokenizer=a/b", f"--endpoint={hub.endpoint}", "--retries=0"])
    assert "no tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to download"),
        (["--shards=5", "--start_after=2"], "belong together"),
        (["--shards=5", "--start_after=5", "--", "true"], "from 1 to --shards"),
        (["--shards=5", "--parallel=0"], "--parallel: 0 is no whole number from 1"),
        (["--shards=5", "--endpoint=hub"], "is no URL"),
    ],
)
def test_flags_that_make_no_sense_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
