"""Downloads that survive interruption: resumed, checked, retried, and renamed only when whole."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import random
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from looped_jax import files
from looped_jax.errors import DataError

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
_BLOCK = 1 << 20
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)  # no server's fault
_LARGEST_UNPACKED = 4 << 30  # bytes; the CORE bundle has 160 MB

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all


class _Broken(Exception):
    """A transfer that failed in a way that may pass."""


def fetch(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    retries: int = 5,
    timeout: float = 30.0,
    backoff: float = 1.0,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
    token: str | None = None,
) -> Path:
    """Download `url` to `path`; returns at once when it is there and passes the checks.

    What arrives is kept as <path>.part, and a later call continues it by a range request, unless
    the remote file has changed meanwhile (<path>.part.version tells). Server errors, stalls of
    `timeout` seconds, short answers and files that `check` raises DataError for are tried again
    `retries` times, after `backoff` · 2ⁿ seconds and a random part. `token` is sent to the host of
    `url` alone, not to where it redirects. Raises DataError naming the URL and what to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with files.only_one(path):
        for attempt in range(retries + 1):
            if path.exists():
                _check_present(path, size, sha256, check)
                return path
            try:
                _transfer(url, part, size, timeout, progress, token)
                if check is not None:
                    _check_arrived(part, check)
                break
            except _Broken as error:
                if attempt == retries:
                    raise DataError(
                        f"{url} failed {retries + 1} times ({error}); {part} keeps what arrived, "
                        "try again later"
                    ) from error
                time.sleep(backoff * 2**attempt * random.uniform(0.5, 1.5))
        if sha256 is not None and (found := _digest(part)) != sha256:
            part.unlink()
            raise DataError(f"{url} has SHA-256 {found}, not {sha256}; check the address")
        os.replace(part, path)
        _version(part).unlink(missing_ok=True)
    return path


def _check_present(
    path: Path, size: int | None, sha256: str | None, check: Callable[[Path], None] | None
) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise DataError(
            f"{path} is there with {found} bytes, not {size}; remove it, then try again"
        )
    if sha256 is not None and (digest := _digest(path)) != sha256:
        raise DataError(
            f"{path} is there with SHA-256 {digest}, not {sha256}; remove it, then try again"
        )
    if check is not None:
        check(path)


def _check_arrived(part: Path, check: Callable[[Path], None]) -> None:
    try:
        check(part)
    except DataError as error:  # whole, by the server's word, but not what it should be
        part.unlink()
        raise _Broken(str(error)) from error


def _version(part: Path) -> Path:
    """Where the server's name for the version of what is in `part` is kept."""
    return part.with_name(part.name + ".version")


def _transfer(
    url: str,
    part: Path,
    size: int | None,
    timeout: float,
    progress: Progress | None,
    token: str | None,
) -> None:
    """Fill `part` from where it ends; raises _Broken unless it is whole afterwards."""
    have, version = part.stat().st_size if part.exists() else 0, _version(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and version.exists():
        headers["If-Range"] = version.read_text("utf-8")  # of another version we get all of it
    try:
        request = urllib.request.Request(url, headers=headers)
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
    except ValueError:
        raise DataError(f"{url!r} is no URL; give one that begins with https://") from None
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            goes_on = have and answer.status == 206 and _starts_at(answer, have)
            have = have if goes_on else 0
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length is not None else size
            if size is not None and total != size:
                raise DataError(f"{url} holds {total} bytes, not {size}; check the address")
            if total is None and not getattr(answer, "chunked", False):
                # The end of such an answer looks just like a connection that broke.
                raise DataError(f"{url} does not say how long it is; give its size")
            if not goes_on and (name := _version_of(answer)):
                version.write_text(name, encoding="utf-8")
            with part.open("ab" if goes_on else "wb") as file:
                while block := answer.read1(_BLOCK):  # as it comes, so that a kill loses little
                    file.write(block)
                    have += len(block)
                    if progress is not None:
                        progress(have, total)
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to ask for, or the file has changed: start anew
            part.unlink(missing_ok=True)
        elif error.code < 500 and error.code not in (408, 429):
            raise DataError(f"{url} answered {error.code} {error.reason}; check it") from error
        raise _Broken(f"{error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in _LOCAL:
            raise DataError(
                f"{part} cannot be written ({error.strerror}); what arrived is kept, "
                "free space or choose another folder"
            ) from error
        raise _Broken(str(error) or type(error).__name__) from error
    if total is not None and have != total:
        if have > total:
            part.unlink()
        raise _Broken(f"{have} of {total} bytes arrived")


def _version_of(answer: http.client.HTTPResponse) -> str | None:
    """What the server calls this version of the file, if it promises to tell versions apart."""
    tag = answer.headers.get("ETag") or ""
    return answer.headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag


def _starts_at(answer: http.client.HTTPResponse, place: int) -> bool:
    return (answer.headers.get("Content-Range") or "").startswith(f"bytes {place}-")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_zip(archive: Path, folder: Path) -> Path:
    """Unpack into `folder`, which appears whole or not at all.

    Raises DataError for a damaged archive, an entry that leads out of the folder, a link, or more
    than 4 GiB in all; nothing is unpacked then.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            entries = file.infolist()
            for entry in entries:
                path = Path(entry.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in entry.filename:
                    raise DataError(f"{archive}: entry {entry.filename!r} leads out of its folder")
                if entry.flag_bits & 1:
                    raise DataError(f"{archive}: entry {entry.filename!r} is encrypted; decrypt it")
                if stat.S_ISLNK(entry.external_attr >> 16):
                    raise DataError(f"{archive}: entry {entry.filename!r} is a link; not unpacked")
            if sum(entry.file_size for entry in entries) > _LARGEST_UNPACKED:
                raise DataError(f"{archive} unpacks to more than {_LARGEST_UNPACKED} bytes")
            with files.new_folder(folder) as part:
                file.extractall(part, entries)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{archive} is no whole zip file ({error}); download it again") from error
    return folder


def fetch_bundle(
    folder: Path, url: str = BUNDLE_URL, *, progress: Progress | None = None, **settings: Any
) -> Path:
    """The CORE bundle, downloaded and unpacked to `folder` unless it is there; settings: fetch's"""
    if (folder / "core.yaml").is_file():
        return folder
    with files.only_one(folder):
        if not (folder / "core.yaml").is_file():  # else another process was faster
            _fetch_bundle(folder, url, progress=progress, **settings)
    return folder


def _fetch_bundle(folder: Path, url: str, **settings: Any) -> None:
    archive = fetch(url, folder.with_name(folder.name + ".zip"), **settings)
    unpacked = folder.with_name(folder.name + ".unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        unpack_zip(archive, unpacked)
        found = sorted(unpacked.rglob("core.yaml"))
        if not found:
            raise DataError(f"{url} holds no core.yaml; it is no CORE bundle")
        os.replace(found[0].parent, folder)
    except DataError:
        archive.unlink()  # so that the next call downloads again
        raise
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink()
