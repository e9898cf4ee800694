"""nanoGPT's meta.pkl: which character each id of train.bin and val.bin stands for.

A pickle is a program. The one here has nothing to call: names of modules are refused, so all that
it can make are dicts, strings and numbers.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from looped_jax.errors import DataError

NAME = "meta.pkl"
_LARGEST = 64 << 20  # bytes; every character there is takes fewer
_MOST_KEPT = 10_000_000
_KEYS = {"vocab_size", "itos", "stoi"}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(f"it wants to load {module}.{name}")


def read_characters(path: Path) -> list[str]:
    """The character of each id, from 0. Raises DataError for a file that holds anything else."""
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError("it is too large")
        data = path.read_bytes()
        if any(_keeps_too_much(op, argument) for op, argument, _ in pickletools.genops(data)):
            raise DataError("it numbers what it keeps beyond all that it has")
        found = _Reader(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(
            f"{path} holds more or less than ids and characters ({error}); nothing of it was run: "
            "remove it, and give data.tokenizer"
        ) from error
    if problem := _problem(found):
        raise DataError(f"{path}: {problem}; write it again, or remove it and give data.tokenizer")
    return [found["itos"][i] for i in range(found["vocab_size"])]


def _keeps_too_much(op: pickletools.OpcodeInfo, argument: Any) -> bool:
    """Whether loading would take memory for as many entries as a number in the file says."""
    return op.name.endswith("PUT") and int(argument) > _MOST_KEPT


def _problem(found: Any) -> str | None:
    if not isinstance(found, dict) or set(found) != _KEYS:
        has = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        return f"it holds {has}, not {sorted(_KEYS)}"
    size, itos, stoi = found["vocab_size"], found["itos"], found["stoi"]
    if not (type(size) is int and isinstance(itos, dict) and isinstance(stoi, dict)):
        return "its itos and stoi are no dicts, or its vocab_size no number"
    if not size or len(itos) != size or any(type(i) is not int or not 0 <= i < size for i in itos):
        return f"its ids are not 0 to {size - 1}"
    if any(not isinstance(text, str) or len(text) != 1 for text in itos.values()):
        return "it has an id that is not one character"
    if stoi != {text: i for i, text in itos.items()}:
        return "its stoi is not the inverse of its itos"
    return None
