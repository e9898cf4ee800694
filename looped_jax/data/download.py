"""FineWeb-edu shards and tokenizers from the hub: in parallel, resumable, checked.

    python -m looped_jax.data.download --shards 250 --tokenizer Qwen/Qwen3-4B

N shards are N − 1 to train on, from the first, and the last of the dataset to validate on, which
comes first and is the same however many there are. A second call continues what is missing. With

    python -m looped_jax.data.download --shards 250 --start_after 8 -- \\
        python -m looped_jax.train --config configs/flt.py --config.data.train_shards=8

the command after -- starts once the validation shard and the first 8 others are there; the rest
goes on arriving beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from looped_jax.data.fetch import fetch
from looped_jax.data.tokenizer import read_tokenizer
from looped_jax.errors import DataError

DATASET = "karpathy/fineweb-edu-100b-shuffle"
LAST_SHARD = 1822
HUB = "https://huggingface.co"


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def wanted_shards(count: int) -> list[str]:
    """Names of `count` shards, validation first. Raises DataError outside 2 … 1823."""
    if not 2 <= count <= LAST_SHARD + 1:
        raise DataError(
            f"--shards={count}: give 2 (one to train on, one to validate) to {LAST_SHARD + 1}"
        )
    return [shard_name(LAST_SHARD), *(shard_name(i) for i in range(count - 1))]


def check_parquet(path: Path) -> None:
    """Raise DataError unless the footer is whole and names a `text` column."""
    try:
        columns = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is no whole parquet file ({reason}); remove it") from error
    if "text" not in columns:
        raise DataError(f"{path} has no column `text`, only {', '.join(columns)}; remove it")


class Progress:
    """Bytes and files so far, as one line every few seconds; safe to call from many threads."""

    def __init__(self, files: int, log: Callable[[str], None], *, every: float = 5.0):
        self.files, self.log, self.every = files, log, every
        self.done = 0
        self._lock = threading.Lock()
        self._bytes: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._began = self._last = time.monotonic()
        self._at_start: dict[str, int] = {}

    def __call__(self, name: str, have: int, total: int | None) -> None:
        with self._lock:
            self._at_start.setdefault(name, have)
            self._bytes[name] = have
            if total:
                self._totals[name] = total
            if time.monotonic() - self._last >= self.every:
                self._tell()

    def finished(self) -> None:
        with self._lock:
            self.done += 1
            self._tell()

    def _tell(self) -> None:
        self._last = time.monotonic()
        have = sum(self._bytes.values())
        fresh = have - sum(self._at_start.values())
        rate = fresh / max(self._last - self._began, 1e-9)
        line = f"{self.done}/{self.files} files, {have / 2**20:,.0f} MiB, {rate / 2**20:.1f} MiB/s"
        if self._totals and rate:
            mean = sum(self._totals.values()) / len(self._totals)  # of files not yet begun, too
            unknown = self.files - self.done - sum(n in self._totals for n in self._bytes)
            left = sum(self._totals.values()) - have + max(unknown, 0) * mean
            line += f", {max(left, 0) / rate / 60:.1f} min left"
        self.log(line)


def download_shards(
    count: int,
    folder: Path,
    *,
    endpoint: str,
    parallel: int,
    dataset: str = DATASET,
    token: str | None = None,
    on_shard: Callable[[set[str]], None] | None = None,
    log: Callable[[str], None] = print,
    **settings: float,
) -> None:
    """Fetch `count` shards into `folder`, `parallel` at a time; `settings` are fetch's.

    `on_shard` gets the names that are there after each. A shard that fails does not stop the
    others; raises DataError for the first that did when all the rest are there.
    """
    names = wanted_shards(count)
    progress = Progress(len(names), log)
    present: set[str] = set()
    problems: list[str] = []

    def one(name: str) -> str:
        url = f"{endpoint}/datasets/{dataset}/resolve/main/{name}"
        fetch(
            url,
            folder / name,
            check=check_parquet,
            token=token,
            progress=lambda have, total: progress(name, have, total),
            **settings,  # type: ignore[arg-type]
        )
        return name

    with ThreadPoolExecutor(parallel) as pool:
        running: set[Future[str]] = {pool.submit(one, name) for name in names}
        try:
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    try:
                        present.add(future.result())
                    except DataError as error:
                        problems.append(str(error))
                        log(f"failed: {error}")
                        continue
                    progress.finished()
                    if on_shard is not None:
                        on_shard(present)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if problems:
        raise DataError(f"{len(problems)} of {len(names)} shards are missing, first: {problems[0]}")


def download_tokenizer(
    repository: str, path: Path, *, endpoint: str, token: str | None = None, **settings: float
) -> None:
    """The tokenizer.json of a hub repository, checked by reading it. Raises DataError."""

    def check(part: Path) -> None:
        read_tokenizer(part, bos_token=None)

    url = f"{endpoint}/{repository}/resolve/main/tokenizer.json"
    fetch(url, path, check=check, token=token, **settings)  # type: ignore[arg-type]


def tokenizer_path(repository: str) -> Path:
    """data/qwen3/tokenizer.json for Qwen/Qwen3-4B: where the paper preset looks for it."""
    name = repository.rpartition("/")[2].lower().partition("-")[0]
    return Path("data") / name / "tokenizer.json"


class Starter:
    """Starts a command, once, when the validation shard and the first N others are there."""

    def __init__(self, command: Sequence[str], after: int, log: Callable[[str], None]):
        self.command, self.log = list(command), log
        self.needed = set(wanted_shards(after + 1))
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, present: set[str]) -> None:
        if self.process is None and self.needed <= present:
            self.log(f"starting: {' '.join(self.command)}")
            self.process = subprocess.Popen(self.command)


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    given, command = (
        (given[: given.index("--")], given[given.index("--") + 1 :])
        if "--" in given
        else (given, [])
    )
    flags = argparse.ArgumentParser(
        prog="python -m looped_jax.data.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--shards", type=int, help="shards in all, the validation one included")
    flags.add_argument("--out", type=Path, default=Path("data/fineweb_edu"), help="their folder")
    flags.add_argument("--dataset", default=DATASET)
    flags.add_argument("--tokenizer", help="hub repository, as Qwen/Qwen3-4B")
    flags.add_argument("--tokenizer_out", type=Path, help="data/<name>/tokenizer.json by default")
    flags.add_argument("--endpoint", default=os.environ.get("HF_ENDPOINT") or HUB)
    flags.add_argument("--parallel", type=int, default=8, help="downloads at once")
    flags.add_argument("--retries", type=int, default=5)
    flags.add_argument("--timeout", type=float, default=30.0, help="seconds without a byte")
    flags.add_argument("--start_after", type=int, help="training shards before the command starts")
    args = flags.parse_args(given)
    if not args.shards and not args.tokenizer:
        flags.error("nothing to download; give --shards, as 250, or --tokenizer, as Qwen/Qwen3-4B")
    if bool(command) != (args.start_after is not None):
        flags.error("--start_after N and a command after -- belong together")
    if args.start_after is not None and not 1 <= args.start_after < (args.shards or 0):
        flags.error(f"--start_after={args.start_after} must be from 1 to --shards − 1")
    if args.parallel < 1:
        flags.error(f"--parallel={args.parallel} downloads nothing; give at least 1")
    endpoint, token = args.endpoint.rstrip("/"), os.environ.get("HF_TOKEN")
    if urllib.parse.urlsplit(endpoint).scheme not in ("http", "https"):
        flags.error(f"--endpoint={args.endpoint!r} is no URL; give one, as {HUB}")

    def log(line: str) -> None:
        print(line, flush=True)

    settings = {"retries": args.retries, "timeout": args.timeout}
    starter = Starter(command, args.start_after, log) if command else None
    try:
        if args.tokenizer:
            path = args.tokenizer_out or tokenizer_path(args.tokenizer)
            download_tokenizer(args.tokenizer, path, endpoint=endpoint, token=token, **settings)
            log(f"tokenizer: --config.data.tokenizer={path}")
        if args.shards:
            download_shards(
                args.shards,
                args.out,
                endpoint=endpoint,
                parallel=args.parallel,
                dataset=args.dataset,
                token=token,
                on_shard=starter,
                log=log,
                **settings,
            )
            log(
                f"{args.shards} shards: --config.data.path={args.out} "
                f"--config.data.val_shard={shard_name(LAST_SHARD)} "
                f"--config.data.train_shards={args.shards - 1}"
            )
    except DataError as error:
        sys.stderr.write(f"error: {error}\n")
        if starter is None or starter.process is None:
            raise SystemExit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command continues what is missing\n")
        raise SystemExit(130) from None
    if starter is not None and starter.process is not None:
        raise SystemExit(starter.process.wait())


if __name__ == "__main__":
    main()
