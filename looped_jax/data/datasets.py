"""Data sets by name: where their files are, how large they have to be, and what to do with them.

Sizes and checksums are written here where the files are known for good; of a data set of the hub
they come with the list of its files.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from looped_jax import files
from looped_jax.data.fetch import fetch
from looped_jax.data.token_files import layout_of
from looped_jax.errors import DataError

HUB = "https://huggingface.co"
_LISTED = 1_000  # files that the hub names in one answer, at most


def hub() -> str:
    """Where the hub is: $HF_ENDPOINT, else its own address."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


@dataclass(frozen=True)
class RemoteFile:
    """What to fetch and what it has to be; `check` raises DataError for a file that is not."""

    name: str
    url: str
    size: int | None = None
    sha256: str | None = None
    check: Callable[[Path], None] | None = None


def check_parquet(path: Path) -> None:
    """Raise DataError unless the footer is whole and names a `text` column."""
    try:
        columns = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is no whole parquet file ({reason}); remove it") from error
    if "text" not in columns:
        raise DataError(f"{path} has no column `text`, only {', '.join(columns)}; remove it")


def check_token_shard(path: Path) -> None:
    """Raise DataError unless it is a whole shard of tokens."""
    layout_of(path)


@dataclass(frozen=True)
class Dataset:
    """One of DATASETS. What it holds is `files`, or else what the hub lists in `repository`."""

    about: str
    use: str  # said when all is there; {out} is its folder
    files: tuple[RemoteFile, ...] = ()
    repository: str = ""
    folder: str = ""  # in the repository
    pattern: str = "*.parquet"  # of the names there
    check: Callable[[Path], None] | None = field(default=check_parquet)
    sharded: bool = False  # training files may be left out, from the last
    in_part: bool = False  # its first documents may be had alone
    finish: Callable[[Path], None] | None = None  # what is done in its folder when all is there

    def remote_file(self, name: str) -> RemoteFile:
        """One of the hub's files, whose name is known."""
        where = f"{self.repository}/resolve/main/{self.folder}"
        return RemoteFile(name, f"{hub()}/datasets/{where}/{name}", check=self.check)

    def remote_files(self, listing: Path, *, endpoint: str, **settings: Any) -> list[RemoteFile]:
        """Its files, validation first. The hub's list is kept at `listing` for a moment."""
        if self.files:
            return list(self.files)
        where = f"{self.repository}/tree/main/{self.folder}".rstrip("/")
        url = f"{endpoint}/api/datasets/{where}"
        listing.unlink(missing_ok=True)
        answer = fetch(url, listing, **settings).read_bytes()
        listing.unlink()
        try:
            entries = json.loads(answer)
            kept = [
                RemoteFile(
                    name,
                    f"{endpoint}/datasets/{self.repository}/resolve/main/{entry['path']}",
                    size=entry["size"],
                    sha256=(entry.get("lfs") or {}).get("oid"),
                    check=self.check,
                )
                for entry in entries
                if entry["type"] == "file"
                and fnmatch.fnmatch(name := entry["path"].rpartition("/")[2], self.pattern)
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{url} is no list of files; check --endpoint") from error
        if len(entries) >= _LISTED:
            raise DataError(f"{url} lists only the first {len(entries)} files; use a part")
        if not kept:
            raise DataError(f"{url} lists no {self.pattern}; the data set has moved")
        return sorted(kept, key=lambda file: ("val" not in file.name, file.name))


SHAKESPEARE = RemoteFile(
    "input.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    size=1_115_394,
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def cut_shakespeare(folder: Path) -> None:
    """Write the first nine tenths of the characters as train.txt, the rest as val.txt.

    Source: nanoGPT (Karpathy, 2022), data/shakespeare_char/prepare.py.
    """
    text = (folder / SHAKESPEARE.name).read_text("utf-8")
    cut = int(0.9 * len(text))
    files.write_text(folder / "train.txt", text[:cut])
    files.write_text(folder / "val.txt", text[cut:])


DATASETS = {
    "shakespeare": Dataset(
        about="tiny Shakespeare, 1 MB of plays; the last tenth validates, as in nanoGPT",
        use="--config.data.path={out}",
        files=(SHAKESPEARE,),
        finish=cut_shakespeare,
    ),
    "tinystories": Dataset(
        about="TinyStories, 2.1 M stories of GPT-3.5 and GPT-4 for children, 1 GB",
        use="--config.data.path={out}",
        repository="roneneldan/TinyStories",
        folder="data",
        in_part=True,
    ),
    "openwebtext": Dataset(
        about="OpenWebText, 8 M web pages, 24 GB; 4,007 of them validate, the same as in nanoGPT",
        use="--config.data.path={out}",
        repository="Skylion007/openwebtext",
        folder="plain_text",
        pattern="train-*.parquet",
        in_part=True,
    ),
    "fineweb10b-gpt2": Dataset(
        about="10 B tokens of FineWeb as GPT-2 cuts them, 104 files of 200 MB, no text",
        use="--config.data.path={out}",
        repository="kjj0/fineweb10B-gpt2",
        pattern="fineweb_*.bin",
        check=check_token_shard,
        sharded=True,
    ),
    "wikitext-2": Dataset(
        about="WikiText-2 for evaluate's perplexity",
        use="--wikitext {out}/test-00000-of-00001.parquet",
        repository="Salesforce/wikitext",
        folder="wikitext-2-v1",
    ),
}
