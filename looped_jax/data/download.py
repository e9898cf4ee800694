"""Data sets by name, and tokenizers of the hub: in parallel, resumable, checked.

    looped-jax download shakespeare
    looped-jax download fineweb-edu --shards 250 --tokenizer Qwen/Qwen3-4B
    looped-jax download tinystories --documents 50000

Of fineweb-edu N shards are N − 1 to train on, from the first, and the last of the dataset to
validate on, which comes first and is the same however many there are. A second call continues what
is missing. With

    looped-jax download fineweb-edu --shards 250 --start_after 8 -- \\
        looped-jax train --config flt --config.data.train_shards=8

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
from typing import Any

from looped_jax import cli
from looped_jax.config.options import either
from looped_jax.data import first_documents, gpt2_tokenizer, openwebtext
from looped_jax.data.datasets import DATASETS, HUB, RemoteFile, check_parquet, hub
from looped_jax.data.fetch import BUNDLE_URL, fetch, fetch_bundle
from looped_jax.data.tokenizer import read_tokenizer
from looped_jax.errors import DataError
from looped_jax.files import default_cache_dir

DATASET = "karpathy/fineweb-edu-100b-shuffle"
LAST_SHARD = 1822
FIRST_OF_FINEWEB = "fineweb_edu_first"  # not among whole shards, which a folder is read with


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def wanted_shards(count: int) -> list[str]:
    """Names of `count` shards, validation first. Raises DataError outside 2 … 1823."""
    if not 2 <= count <= LAST_SHARD + 1:
        raise DataError(
            f"--shards={count}: give 2 (one to train on, one to validate) to {LAST_SHARD + 1}"
        )
    return [shard_name(LAST_SHARD), *(shard_name(i) for i in range(count - 1))]


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


def fineweb_edu(count: int, *, endpoint: str, dataset: str = DATASET) -> list[RemoteFile]:
    """`count` of its shards, validation first. Raises DataError outside 2 … 1823."""
    url = f"{endpoint}/datasets/{dataset}/resolve/main"
    return [RemoteFile(n, f"{url}/{n}", check=check_parquet) for n in wanted_shards(count)]


def download_files(
    wanted: Sequence[RemoteFile],
    folder: Path,
    *,
    parallel: int,
    token: str | None = None,
    on_file: Callable[[set[str]], None] | None = None,
    log: Callable[[str], None] = print,
    **settings: Any,
) -> None:
    """Fetch them into `folder`, `parallel` at a time; `settings` are fetch's.

    `on_file` gets the names that are there after each. A file that fails does not stop the
    others; raises DataError for the first that did when all the rest are there.
    """
    progress = Progress(len(wanted), log)
    present: set[str] = set()
    problems: list[str] = []

    def one(file: RemoteFile) -> str:
        fetch(
            file.url,
            folder / file.name,
            size=file.size,
            sha256=file.sha256,
            check=file.check,
            token=token,
            progress=lambda have, total: progress(file.name, have, total),
            **settings,
        )
        return file.name

    with ThreadPoolExecutor(parallel) as pool:
        running: set[Future[str]] = {pool.submit(one, file) for file in wanted}
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
                    if on_file is not None:
                        on_file(present)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if problems:
        raise DataError(f"{len(problems)} of {len(wanted)} files are missing, first: {problems[0]}")


def download_dataset(
    name: str,
    folder: Path,
    *,
    endpoint: str,
    parallel: int,
    shards: int | None = None,
    token: str | None = None,
    log: Callable[[str], None] = print,
    **settings: Any,
) -> None:
    """One of DATASETS into `folder`; `settings` are fetch's. Raises DataError.

    shards: files of it, validation included; all of them by default
    """
    dataset = DATASETS[name]
    listing = folder / ".files.json"
    wanted = dataset.remote_files(listing, endpoint=endpoint, token=token, **settings)
    wanted = wanted[:shards]
    into = folder
    if name == "openwebtext":
        into = folder / "raw"
        names = [file.name for file in wanted]
        wanted = [file for file in wanted if not (folder / file.name).is_file()]
    download_files(wanted, into, parallel=parallel, token=token, log=log, **settings)
    if dataset.finish:
        dataset.finish(folder)
    if name == "openwebtext":
        log("taking the documents for validation out ...")
        openwebtext.split(names, into, folder)


def download_first(
    name: str,
    count: int,
    folder: Path,
    *,
    endpoint: str,
    repository: str | None = None,
    token: str | None = None,
    log: Callable[[str], None] = print,
    **settings: Any,
) -> Path:
    """The first `count` training documents of a data set, in one file. Raises DataError.

    repository: of fineweb-edu's shards
    """
    if name == "fineweb-edu":
        every = fineweb_edu(LAST_SHARD + 1, endpoint=endpoint, dataset=repository or DATASET)
        wanted = every[1:]  # without the one that validates
    else:
        listing = folder / ".files.json"
        found = DATASETS[name].remote_files(listing, endpoint=endpoint, token=token, **settings)
        wanted = [file for file in found if "val" not in file.name]
    progress = Progress(1, log)
    return first_documents.download(
        wanted, count, folder, progress=progress, token=token, **settings
    )


def download_tokenizer(
    repository: str, path: Path, *, endpoint: str, token: str | None = None, **settings: float
) -> None:
    """The tokenizer.json of a hub repository, checked by reading it. Raises DataError.

    gpt2 is OpenAI's own, whatever the hub.
    """
    if repository == "gpt2":
        return gpt2_tokenizer.download(path, **settings)

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


NAMES = ("fineweb-edu", *DATASETS, "core")


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("download", argv))


def run(args: argparse.Namespace) -> None:
    name = args.name or ("fineweb-edu" if args.shards else None)
    if not name and not args.tokenizer:
        cli.stop(
            f"nothing to download; give a name, {either(NAMES)}, or --tokenizer, as Qwen/Qwen3-4B"
        )
    if name and name not in NAMES:
        cli.stop(f"{name!r} is no data set; choose {either(NAMES)}")
    if args.documents is not None:
        parts = ("fineweb-edu", *(n for n, dataset in DATASETS.items() if dataset.in_part))
        if name not in parts:
            cli.stop(f"--documents={args.documents} goes with {either(parts)}; leave it out")
        if args.shards is not None or args.start_after is not None:
            cli.stop(f"--documents={args.documents} says how much; leave --shards out")
    elif name == "fineweb-edu" and not args.shards:
        cli.stop("fineweb-edu has 1823 shards; give --shards, as 250, or --documents, as 50000")
    sharded = name == "fineweb-edu" or (name in DATASETS and DATASETS[name].sharded)
    if args.shards is not None and not sharded:
        cli.stop(f"--shards={args.shards}: {name} comes whole; leave it out")
    if args.shards is not None and args.shards < 2:
        cli.stop(f"--shards={args.shards}: give 2 or more, one to train on, one to validate")
    if args.start_after is not None and name != "fineweb-edu":
        cli.stop(f"--start_after={args.start_after} goes with fineweb-edu; leave it out")
    for flag, of in (("dataset", "fineweb-edu"), ("bundle_url", "core")):
        if getattr(args, flag) and name != of:
            cli.stop(f"--{flag} goes with {of}; leave it out")
    if bool(args.command) != (args.start_after is not None):
        cli.stop("--start_after N and a command after -- belong together")
    if args.start_after is not None and not args.start_after < (args.shards or 0):
        cli.stop(f"--start_after={args.start_after} must be from 1 to --shards − 1")
    endpoint = (args.endpoint or hub()).rstrip("/")
    token = os.environ.get("HF_TOKEN")
    if urllib.parse.urlsplit(endpoint).scheme not in ("http", "https"):
        cli.stop(f"--endpoint={endpoint!r} is no URL; give one, as {HUB}")

    def log(line: str) -> None:
        print(line, flush=True)

    settings = {"retries": args.retries, "timeout": args.timeout}
    starter = Starter(args.command, args.start_after, log) if args.command else None
    try:
        if args.tokenizer:
            path = args.tokenizer_out or tokenizer_path(args.tokenizer)
            download_tokenizer(args.tokenizer, path, endpoint=endpoint, token=token, **settings)
            log(f"tokenizer: --config.data.tokenizer={path}")
        if name == "core":
            folder = args.out or default_cache_dir() / "eval_bundle"
            bundle = fetch_bundle(folder, args.bundle_url or BUNDLE_URL, **settings)
            log(f"core: --bundle {bundle}" + ("" if args.out else ", where evaluate looks"))
        elif name and args.documents is not None:
            path = download_first(
                name,
                args.documents,
                args.out or Path("data") / name.replace("fineweb-edu", FIRST_OF_FINEWEB),
                endpoint=endpoint,
                repository=args.dataset,
                token=token,
                log=log,
                **settings,
            )
            log(f"{name}: --config.data.path={path}")
        elif name in DATASETS:
            folder = args.out or Path("data") / name
            download_dataset(
                name,
                folder,
                endpoint=endpoint,
                parallel=args.parallel,
                shards=args.shards,
                token=token,
                log=log,
                **settings,
            )
            log(f"{name}: {DATASETS[name].use.format(out=folder)}")
        elif name == "fineweb-edu":
            folder = args.out or Path("data/fineweb_edu")
            wanted = fineweb_edu(args.shards, endpoint=endpoint, dataset=args.dataset or DATASET)
            download_files(
                wanted, folder, parallel=args.parallel, token=token, on_file=starter, log=log,
                **settings,
            )  # fmt: skip
            log(
                f"{args.shards} shards: --config.data.path={folder} "
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
