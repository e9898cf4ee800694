"""nanochat's tokenizer.pkl, a pickled tiktoken Encoding, as a tokenizer.json.

A pickle is a program, so this reader runs none: it knows the one class such a file needs, as an
inert stand-in, and refuses every other name. tiktoken itself is not needed.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from looped_jax.errors import UserError


class UnsafeTokenizer(UserError, ValueError):
    """A file that is no pickled tiktoken Encoding and nothing else; the message names it."""


class _Encoding:
    """Stands in for tiktoken.core.Encoding: takes its state and does nothing with it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Encoding
        raise UnsafeTokenizer(f"it wants to run {module}.{name}")


def read_encoding(path: Path) -> dict[str, Any]:
    """{pat_str, mergeable_ranks: bytes -> id, special_tokens: str -> id} of a tokenizer.pkl.

    Raises UnsafeTokenizer when the file holds anything else, OSError when it cannot be read.
    """
    try:
        found = _Reader(io.BytesIO(path.read_bytes())).load()
    except UnsafeTokenizer as error:
        raise UnsafeTokenizer(
            f"{path} is not only a tiktoken Encoding: {error}; nothing of it was run"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise UnsafeTokenizer(f"{path} is no pickle of a tiktoken Encoding ({error})") from None
    state = getattr(found, "state", None) if isinstance(found, _Encoding) else None
    kinds = {"pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}
    if not isinstance(state, dict) or any(
        not isinstance(state.get(key), kind) for key, kind in kinds.items()
    ):
        raise UnsafeTokenizer(f"{path} holds no tiktoken Encoding with {', '.join(kinds)}")
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    whole = all(
        isinstance(token, kind) and type(rank) is int
        for table, kind in ((ranks, bytes), (special, str))
        for token, rank in table.items()
    )
    if not whole or sorted([*ranks.values(), *special.values()]) != list(
        range(len(ranks) + len(special))
    ):
        raise UnsafeTokenizer(f"{path}: its token ids are not 0, 1, 2, … each once")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UnsafeTokenizer(f"{path} lacks single bytes, so that some text has no tokens")
    return {key: state[key] for key in kinds}


def to_tokenizer_json(path: Path) -> str:
    """The tokenizer.json that cuts text into the same ids. Errors as in read_encoding."""
    encoding = read_encoding(path)
    ranks, special = encoding["mergeable_ranks"], encoding["special_tokens"]
    if min(special.values(), default=len(ranks)) != len(ranks):
        raise UnsafeTokenizer(f"{path}: special tokens have to follow the others")
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    core = tokenizers.Tokenizer(
        models.BPE(
            vocab={spell(token): rank for token, rank in ranks.items()},
            merges=[(spell(left), spell(right)) for left, right in merges(ranks)],
            ignore_merges=True,  # as tiktoken: a piece that is a token stays whole
        )
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(encoding["pat_str"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(sorted(special, key=special.__getitem__))
    return json.dumps(json.loads(core.to_str()), ensure_ascii=False)


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that together are a token, by the rank of what they make.

    tiktoken keeps no list of merges: it joins any two neighbours whose join is a token, the lowest
    rank first.
    """
    pairs = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        pairs += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return pairs


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level tokenizer.json."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    place = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [place.get(byte, chr(byte)) for byte in range(256)]
