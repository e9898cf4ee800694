"""Files of a model on the hub, downloaded once: resumed, and checked against the hub's own list."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from looped_jax import files
from looped_jax.data.datasets import RemoteFile, hub
from looped_jax.data.download import download_files
from looped_jax.data.fetch import fetch
from looped_jax.files import default_cache_dir
from torch_ref.checkpoint_files import ConvertError

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_CHECKED = ".checked.json"  # sizes of all files, by name, once they are there and have been checked


def download(
    name: str,
    choose: Callable[[Sequence[str]], Iterable[str]],
    *,
    endpoint: str | None = None,
    **settings: Any,
) -> Path:
    """A folder with those files of OWNER/NAME that `choose` takes of the names that the hub lists.

    A second call continues what is missing; where nothing is, the hub is not asked. `settings` are
    fetch's. Raises ConvertError, DataError.
    """
    if not _NAME.fullmatch(name):
        raise ConvertError(
            f"{name!r} is no folder and no model of the hub, as openai-community/gpt2"
        )
    folder = default_cache_dir() / "models" / name.replace("/", "--")
    if _is_whole(folder):
        return folder
    endpoint, token = (endpoint or hub()).rstrip("/"), os.environ.get("HF_TOKEN")
    listing, url = folder / ".files.json", f"{endpoint}/api/models/{name}/tree/main"
    listing.unlink(missing_ok=True)
    answer = fetch(url, listing, token=token, **settings).read_bytes()
    listing.unlink()
    try:
        found = {
            entry["path"]: RemoteFile(
                entry["path"],
                f"{endpoint}/{name}/resolve/main/{entry['path']}",
                size=entry["size"],
                sha256=(entry.get("lfs") or {}).get("oid"),
            )
            for entry in json.loads(answer)
            if entry["type"] == "file"
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ConvertError(f"{url} is no list of files; check --endpoint") from error
    chosen = list(choose(list(found)))
    if missing := [file for file in chosen if file not in found]:
        raise ConvertError(f"{name} has no {missing[0]} on the hub; choose another model")
    download_files([found[file] for file in chosen], folder, parallel=4, token=token, **settings)
    sizes = {file: (folder / file).stat().st_size for file in chosen}
    files.write_json(folder / _CHECKED, sizes)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether all files are there as they were checked."""
    try:
        sizes = json.loads((folder / _CHECKED).read_text("utf-8"))
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError):
        return False
