"""Files of a model on the hub, downloaded once: resumed, and checked against the hub's own list."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from looped_jax.data.datasets import RemoteFile, hub
from looped_jax.data.download import download_files
from looped_jax.data.fetch import fetch
from looped_jax.files import default_cache_dir
from torch_ref.checkpoint_files import ConvertError

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def download(
    name: str,
    needed: Sequence[str],
    optional: Sequence[str] = (),
    *,
    endpoint: str | None = None,
    **settings: Any,
) -> Path:
    """A folder with the named files of OWNER/NAME, as far as it has the optional ones.

    A second call continues what is missing; `settings` are fetch's. Raises ConvertError, DataError.
    """
    if not _NAME.fullmatch(name):
        raise ConvertError(
            f"{name!r} is no folder and no model of the hub, as openai-community/gpt2"
        )
    endpoint, token = (endpoint or hub()).rstrip("/"), os.environ.get("HF_TOKEN")
    folder = default_cache_dir() / "models" / name.replace("/", "--")
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
            if entry["type"] == "file" and entry["path"] in (*needed, *optional)
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ConvertError(f"{url} is no list of files; check --endpoint") from error
    if missing := [file for file in needed if file not in found]:
        raise ConvertError(f"{name} has no {missing[0]} on the hub; choose another model")
    download_files(list(found.values()), folder, parallel=4, token=token, **settings)
    return folder
