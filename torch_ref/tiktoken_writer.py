"""A tokenizer.json as nanochat's tokenizer.pkl, a pickled tiktoken Encoding.

A pickle names its class and holds its state, so tiktoken itself is not needed to write one. What
`tiktoken_reader` made of such a file becomes the same bytes again.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

from looped_jax.errors import UserError
from torch_ref.tiktoken_reader import byte_letters

_NAME = "rustbpe"  # what nanochat calls its Encoding
# What a ByteLevel pre-tokenizer cuts by where it has no other pattern before it: GPT-2's.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class NoTiktoken(UserError, ValueError):
    """A tokenizer.json that no tiktoken Encoding cuts alike; the message says why."""


def to_tokenizer_pickle(path: Path) -> bytes:
    """The tokenizer.pkl that cuts text into the same ids as `path`, a byte-level BPE.

    Raises NoTiktoken, OSError.
    """
    found = json.loads(path.read_text("utf-8"))
    model = found.get("model", {})
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise NoTiktoken(f"{path} is no BPE of bytes, and tiktoken knows no other")
    special = {entry["content"]: entry["id"] for entry in found.get("added_tokens", ())}
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    ranks = {}
    for word, rank in sorted(model["vocab"].items(), key=lambda entry: entry[1]):
        if word not in special:
            if not set(word) <= set(byte_of):
                raise NoTiktoken(f"{path}: the entry {word!r} is not spelled in bytes")
            ranks[bytes(byte_of[letter] for letter in word)] = rank
    _check_order(path, model["vocab"], model.get("merges", []))
    return _pickled(
        {
            "name": _NAME,
            "pat_str": _pattern(path, found.get("pre_tokenizer") or {}),
            "mergeable_ranks": ranks,
            "special_tokens": dict(sorted(special.items(), key=lambda entry: entry[1])),
        }
    )


def _check_order(path: Path, vocab: dict[str, int], merges: list) -> None:
    """tiktoken joins by the id of what it makes, so merges have to be listed in that order."""
    latest = -1
    for merge in merges:
        word = "".join(merge if isinstance(merge, list) else merge.split(" "))
        rank = vocab.get(word, -1)
        if rank < latest:
            raise NoTiktoken(
                f"{path}: {word!r} (id {rank}) is merged after id {latest}; tiktoken merges in the "
                "order of ids, and would cut text otherwise"
            )
        latest = rank


def _pattern(path: Path, pre_tokenizer: dict[str, Any]) -> str:
    """The regular expression that text is cut by before merging."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    match [step.get("type") for step in steps]:
        case ["Split", "ByteLevel"] if (
            "Regex" in steps[0]["pattern"]
            and steps[0]["behavior"] == "Isolated"
            and not steps[0]["invert"]
            and not steps[1]["use_regex"]
            and not steps[1]["add_prefix_space"]
        ):
            return steps[0]["pattern"]["Regex"]
        case ["ByteLevel"] if steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
            return _GPT2_PATTERN
    raise NoTiktoken(
        f"{path} cuts text by more than one regular expression, which is all that tiktoken can"
    )


class _Encoding:
    """Stands for tiktoken.core.Encoding in what is written."""


class _Pickler(pickle._Pickler):  # the one in Python: that in C looks the class up
    def save_global(self, obj: Any, name: str | None = None) -> None:
        self.save("tiktoken.core")
        self.save("Encoding")
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


def _pickled(state: dict[str, Any]) -> bytes:
    encoding = _Encoding()
    encoding.__dict__.update(state)
    file = io.BytesIO()
    _Pickler(file, protocol=4).dump(encoding)
    return file.getvalue()
