"""Which files are trained on, which validate, and whether they are fit for it.

A corpus is a file of text or a folder of them: parquet with a string column `text`, JSON lines with
a field `text`, or plain text; or files of tokens. What a file is for is read from its name, as sets
of the hub have it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from looped_jax import files
from looped_jax.config.options import either
from looped_jax.config.settings import DataConfig
from looped_jax.data.builtin_corpus import BUILTIN_VAL_SHARD, build_builtin
from looped_jax.data.document_files import DocumentFile, ParquetFile, Share
from looped_jax.data.text_files import JSONLinesFile, TextFile
from looped_jax.data.token_files import TokenFile, looks_like_tokens
from looped_jax.errors import DataError

KINDS: dict[str, type[DocumentFile]] = {
    ".parquet": ParquetFile,
    ".jsonl": JSONLinesFile,
    ".txt": TextFile,
    ".bin": TokenFile,
}
_TABLES = (".json", ".csv", ".tsv", ".arrow")  # what is in them is no running text
VAL_SHARE = 0.05  # of the documents of a corpus of one file
# Words in the name of a file, or of its folder inside the corpus, that say what it is for.
_WORDS = {
    "test": ("test", "tests"),
    "validation": ("validation", "valid", "val", "dev"),
    "train": ("train", "training"),
}
_NO_CORPUS = ("readme", "license", "licence", "notice")  # text that lies beside text


@dataclass(frozen=True)
class Corpus:
    """Files to train on and files to validate on, each in reading order."""

    train: tuple[DocumentFile, ...]
    val: tuple[DocumentFile, ...]

    @classmethod
    def open(cls, data: DataConfig) -> Corpus:
        """The files of data.path, or of the builtin corpus; all of them are checked.

        Of a folder, files named test are left out, files named validation validate, and those named
        train are trained on, or all the others when none is named so. Without a file for validation
        it is data.val_shard, else the last by name; of a single file, a share of its documents.
        Training takes the first data.train_shards. Raises DataError that names file and mend.
        """
        corpus = _chosen(data)
        if not corpus.train or len(corpus.train) < (data.train_shards or 1):
            raise DataError(
                f"data.path: {data.path} holds {len(corpus.train)} files to train on beside "
                f"{corpus.val[0].name} for validation, but {data.train_shards or 1} are needed; "
                "add some" + (" or lower data.train_shards" if data.train_shards else "")
            )
        for file in (*corpus.train, *corpus.val):
            file.check()
        corpus.check_formats()
        _check_shares(corpus.train, corpus.val)
        return corpus

    @classmethod
    def to_judge(cls, data: DataConfig, path: str | None = None) -> Corpus:
        """The text to judge a trained model on: file or folder `path`, else the run's own.

        Files to train on may be missing. A file `path` validates whole. Raises DataError.
        """
        if path is not None:
            named = data.val_shard and (Path(path).expanduser() / data.val_shard).is_file()
            data = dataclasses.replace(
                data, path=path, train_shards=None, val_share=None,
                val_shard=data.val_shard if named else None,
            )  # fmt: skip
        corpus = _chosen(data, cut=path is None)
        if len(corpus.train) < (data.train_shards or 0):
            by_name = split_of(corpus.val[0].path, Path(data.path).expanduser()) == "validation"
            if not (data.val_shard or by_name):
                raise DataError(
                    f"data.path: {data.path} holds {len(corpus.train)} of the {data.train_shards} "
                    "files trained on; which one validates cannot be told; give it, as --data FILE"
                )
        for file in (*corpus.train[:1], *corpus.val):
            file.check()
        corpus.check_formats()
        _check_shares(corpus.val)
        return corpus

    @property
    def token_files(self) -> tuple[TokenFile, ...]:
        """All files, if they hold tokens; none of a corpus of text."""
        return tuple(file for file in (*self.train, *self.val) if isinstance(file, TokenFile))

    def check_formats(self) -> None:
        """Raise DataError for files of tokens that are not all written in one format."""
        for file in (found := self.token_files)[1:]:
            if file.format != found[0].format:
                raise DataError(
                    f"data.path: {found[0].path} and {file.path} hold tokens of different formats, "
                    f"{found[0].format.dtype} and {file.format.dtype}; keep those of one"
                )

    def check_ids(self, vocab_size: int, start: Sequence[int] | None = None) -> None:
        """Raise DataError for a token file that a vocabulary of so many entries did not write.

        start: what a document begins with, where the tokenizer is known
        """
        for file in self.token_files:
            file.check_ids(vocab_size, start)

    def fingerprint(self) -> dict[str, Any]:
        """What two corpora of the same text share, ready for JSON."""
        train, val = ([file.describe() for file in each] for each in (self.train, self.val))
        return {"val": val[0] if len(val) == 1 else val, "train": train}


class RowGroups:
    """Random access to the documents of row group i, counted over `text_files` in order.

    Of each file, row groups `start`, `start` + `every`, … Keeps paths, not open files, so that
    worker processes can have it. Raises DataError that names the file and the place in it when one
    cannot be read.
    """

    def __init__(self, text_files: Sequence[DocumentFile], *, start: int = 0, every: int = 1):
        self._files = tuple(text_files)
        self._groups = [range(start, len(file), every) for file in self._files]
        self._ends = np.cumsum([len(groups) for groups in self._groups])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> list[Any]:
        which = int(np.searchsorted(self._ends, i, side="right"))
        return self._files[which][self._groups[which][i - int(self._ends[which])]]

    def mean_size(self) -> float:
        """Bytes of a row group, unpacked."""
        return sum(file.size() for file in self._files) / len(self)


def _chosen(data: DataConfig, *, cut: bool = True) -> Corpus:
    """Files by what they are for, unchecked; `cut`: a corpus of one file is cut in two."""
    root, val_shard = Path(data.path).expanduser(), data.val_shard
    if data.path == "builtin":
        root = build_builtin(files.default_cache_dir())
        val_shard = val_shard or BUILTIN_VAL_SHARD
    paths = _text_files(root)
    named = {name: [p for p in paths if split_of(p, root) == name] for name in (*_WORDS, None)}
    for_training = named["train"] or named[None]
    if val_shard:
        val = [root / val_shard]
        if val[0] not in paths:
            raise DataError(
                f"data.val_shard: {root} holds no {val_shard}; choose one that it holds, "
                f"such as {paths[-1].name}"
            )
    else:
        val = named["validation"]
    if val and data.val_share is not None:
        raise DataError(
            f"data.val_share={data.val_share}: {root} has {val[0].name} for validation; leave "
            "data.val_share out, or give the files to train on alone"
        )
    if not (val or for_training):
        raise DataError(
            f"data.path: {root} holds only {paths[-1].name}, by its name for tests, which is never "
            "trained on; rename it, or give its own path"
        )
    if left_out := sorted({*paths} - {*for_training, *val}):
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        print(f"data.path: not trained on: {left_out[0].relative_to(root)}{more}", flush=True)
    if not val and cut and (data.val_share is not None or len(for_training) == 1):
        share = VAL_SHARE if data.val_share is None else data.val_share
        train, validates = Share(share, validates=False), Share(share, validates=True)
        return Corpus(
            tuple(_file(path, train) for path in for_training[: data.train_shards]),
            tuple(_file(path, validates) for path in for_training[: data.train_shards]),
        )
    val = val or [for_training[-1]]
    train_paths = [path for path in for_training if path not in val][: data.train_shards]
    return Corpus(tuple(map(_file, train_paths)), tuple(map(_file, val)))


def _check_shares(*parts: Sequence[DocumentFile]) -> None:
    """Raise DataError unless each part has documents: one file of several may have none."""
    for part in parts:
        share = part[0].share
        if share is not None and not any(file.has_documents() for file in part):
            kind, mend = ("validate", "raise") if share.validates else ("train on", "lower")
            raise DataError(
                f"data.val_share={share.of_all} leaves no document of "
                f"{part[0].path if len(part) == 1 else part[0].path.parent} to {kind}; {mend} "
                "it, or give more text"
            )


def _file(path: Path, share: Share | None = None) -> DocumentFile:
    return KINDS.get(path.suffix, TextFile)(path, share)


def _text_files(root: Path) -> list[Path]:
    """Files of text: `root` itself, or those in it, or else those in its folders, by name."""
    kinds = either([f"*{kind}" for kind in KINDS])
    if root.is_file():
        if root.suffix in _TABLES:
            raise DataError(f"data.path: {root} is none of {kinds}; convert it or give another")
        return [root]  # whatever else is named is read as plain text
    if not root.is_dir():
        raise DataError(
            f"data.path: there is no folder or file {root}; give one with text ({kinds}), get one "
            "with python -m looped_jax.data.download, or use --config.data.path=builtin"
        )
    for pattern in ("*", "*/*"):
        found = [
            path
            for path in sorted(root.glob(pattern))
            if path.suffix in KINDS
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
            and path.stem.lower() not in _NO_CORPUS
        ]
        found = _all_text_or_all_tokens(found)
        foreign = all(path.suffix == ".bin" and not looks_like_tokens(path) for path in found)
        if found and foreign and pattern == "*" and any(map(_is_text, root.glob("*/*"))):
            print(f"data.path: beside folders of text, left out: {found[0].name}", flush=True)
            continue
        # What lies beside parquet shards, such as a list of their addresses, is no text of theirs.
        shards = [path for path in found if path.suffix == ".parquet"]
        if shards and len(shards) < len(found) and not any(split_of(p, root) for p in found):
            others = sorted({*found} - {*shards})
            print(f"data.path: beside parquet shards, left out: {others[0].name}", flush=True)
            return shards
        if found:
            return found
    raise DataError(f"data.path: {root} holds no {kinds} file; give a folder that does")


def _is_text(path: Path) -> bool:
    return path.suffix in KINDS and path.suffix != ".bin" and path.stem.lower() not in _NO_CORPUS


def _all_text_or_all_tokens(found: list[Path]) -> list[Path]:
    """Token files, where some lie beside text, which is then what they were made of.

    Other files end with .bin, too: beside text those that do not look like tokens are left out.
    """
    binary = [path for path in found if path.suffix == ".bin"]
    if not 0 < len(binary) < len(found):
        return found
    text = [path for path in found if path.suffix != ".bin"]
    kept, others = (binary, text) if any(map(looks_like_tokens, binary)) else (text, binary)
    of = "token files" if kept is binary else "text"
    print(f"data.path: beside {of}, left out: {others[0].name}", flush=True)
    return kept


def split_of(path: Path, root: Path) -> str | None:
    """What the name of a file of corpus `root` says it is for: test, validation, train or None.

    A corpus that is itself one file says nothing: whoever names it means it.
    """
    inside = path.relative_to(root).with_suffix("").as_posix() if path != root else ""
    words = re.split(r"[^a-z]+", inside.lower())
    return next((name for name, those in _WORDS.items() if {*those} & {*words}), None)
