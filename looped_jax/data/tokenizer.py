"""Text to token ids and back: any byte-level `tokenizer.json`, or one trained on the corpus.

Beside it one whose tokens are characters: alphabets.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from looped_jax import files
from looped_jax.config.settings import DataConfig
from looped_jax.data import alphabets, nanogpt_meta
from looped_jax.data.corpus import Corpus, RowGroups
from looped_jax.errors import ArgumentError, DataError

# nanochat's: GPT-4's pattern, but digits in groups of one or two. The `+` after a quantifier makes
# it possessive.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
BYTES, CHARACTERS = "bytes", "characters"  # what data.tokenizer may be beside a file
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# By which a document starts, of the tokenizers of nanochat, Qwen, GPT-2, Llama 3, Gemma and others.
_BOS_CANDIDATES = (
    "<|bos|>", "<|im_start|>", "<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>", "</s>",
)  # fmt: skip
_STOP_CANDIDATES = (*_BOS_CANDIDATES, "<|im_end|>", "<|assistant_end|>", "<|end_of_text|>")
# As nanochat does: of each document the first so many characters, so many in all.
_DOCUMENT_CHARACTERS = 10_000
_TRAINING_CHARACTERS = 2_000_000_000
_ENCODED_AT_ONCE = 1 << 20  # characters
_SMALLEST = 256 + len(SPECIAL_TOKENS)


class Tokenizer:
    """A tokenizer with its document start, stop tokens and byte lengths.

    Byte-level, or of single characters, as alphabets.of_characters makes it. One without special
    tokens has no document start. Special strings inside a text are ordinary text. Picklable, for
    worker processes.

    start: what documents and prompts begin with: the id of the start token, or nothing
    """

    def __init__(self, core: tokenizers.Tokenizer, *, bos_token: str | None, source: str):
        self._of_characters = _of_characters(core)
        if not (isinstance(core.decoder, decoders.ByteLevel) or self._of_characters):
            raise DataError(
                f"data.tokenizer: {source} is not byte-level (its decoder is "
                f"{type(core.decoder).__name__}), so tokens have no byte lengths; give one that is"
            )
        core.encode_special_tokens = True
        core.no_truncation()  # files may carry both from whoever saved them
        core.no_padding()
        self._core = core
        self._added = {i: token for i, token in core.get_added_tokens_decoder().items()}
        specials = {token.content: i for i, token in self._added.items() if token.special}
        wanted = (bos_token,) if bos_token else _BOS_CANDIDATES
        found = [token for token in wanted if token in specials]
        if not found and (specials or bos_token):
            raise DataError(
                f"data.bos_token: {source} has no special token {' or '.join(wanted)}; "
                f"choose one of {', '.join(specials) or 'none: it has no special tokens'}"
            )
        self.bos_token = found[0] if found else None
        self.start = [specials[token] for token in found[:1]]
        stops = {specials[t] for t in _STOP_CANDIDATES if t in specials}
        self.stop_ids = frozenset({*self.start, *stops})

    def __reduce__(self):
        return _rebuild, (self.to_json(), self.bos_token)

    @functools.cached_property
    def vocab_size(self) -> int:
        """V: one more than the largest id."""
        return max(self._core.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int:
        """The id of the start token. Raises DataError where there is none."""
        if not self.start:
            raise DataError(
                f"the tokenizer of {self.vocab_size} entries has no start token, which is wanted "
                "here; use one that has"
            )
        return self.start[0]

    def encode(self, text: str) -> list[int]:
        """Raises DataError for a character that is none of its characters."""
        return self._known(text, self._core.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, texts: Sequence[str], /) -> list[np.ndarray]:
        """[BOS] + tokens of each text, int32; without a start token its tokens alone."""
        return [
            np.array([*self.start, *self._known(text, e.ids)], np.int32)
            for some in _parts(texts)
            for text, e in zip(
                some, self._core.encode_batch_fast(some, add_special_tokens=False), strict=True
            )
        ]

    def prompt(self, text: str) -> list[int]:
        """What a model goes on from: as a document, but not without a token: ArgumentError."""
        if ids := [*self.start, *self.encode(text)]:
            return ids
        raise ArgumentError(
            "an empty prompt is no token for a tokenizer without a start token; give one, as a "
            "line end or a letter"
        )

    def _known(self, text: str, ids: list[int]) -> list[int]:
        if self._of_characters and len(ids) < len(text):  # what is unknown makes no token
            unknown = next(each for each in text if self._core.token_to_id(each) is None)
            raise DataError(
                f"{unknown!r} in {text[:40]!r} is none of the {self.vocab_size} characters that "
                "the tokenizer knows; leave it out, or train with one that knows it"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._core.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Raw bytes of each token, int32 [V]; 0 for special tokens and unused ids."""
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, index in self._core.get_vocab(with_added_tokens=False).items():
            # One character of the byte-level alphabet is one byte.
            sizes[index] = len(token.encode() if self._of_characters else token)
        for index, added in self._added.items():
            sizes[index] = 0 if added.special else len(added.content.encode())
        return sizes

    def to_json(self) -> str:
        return self._core.to_str()

    def fingerprint(self) -> dict[str, Any]:
        """What two tokenizers that cut all text alike share; ready for JSON."""
        # As the library writes it: releases 0.21 to 0.23 do so alike.
        canonical = json.dumps(json.loads(self.to_json()), sort_keys=True)
        return {
            "sha256": hashlib.sha256(canonical.encode()).hexdigest(),
            "vocab_size": self.vocab_size,
            "bos_token": self.bos_token,
        }


def _of_characters(core: tokenizers.Tokenizer) -> bool:
    """Whether it is one of alphabets.of_characters."""
    tokens = core.get_vocab(with_added_tokens=False)
    return isinstance(core.decoder, decoders.Fuse) and all(len(token) == 1 for token in tokens)


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in their order, a few at once: encoded ones take thirty times their length."""
    part: list[str] = []
    characters = 0
    for text in texts:
        part.append(text)
        characters += len(text)
        if characters >= _ENCODED_AT_ONCE:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _rebuild(text: str, bos_token: str | None) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text), bos_token=bos_token, source="a copy")


def _tokenizer_of_tokens(data: DataConfig, corpus: Corpus) -> Tokenizer | None:
    """Whose tokens the files of `corpus` hold: data.tokenizer; else meta.pkl's, or bytes.

    None where nobody says. Errors as in load_tokenizer, and nanogpt_meta's.
    """
    first = corpus.token_files[0]
    if data.tokenizer in (BYTES, CHARACTERS):
        raise DataError(
            f"data.tokenizer={data.tokenizer}: {first.path} holds tokens, whose vocabulary is what "
            "it is; leave it out, or give the tokenizer.json that they were written with"
        )
    if data.tokenizer is not None:
        return read_tokenizer(Path(data.tokenizer).expanduser(), bos_token=data.bos_token)
    if (meta := first.path.with_name(nanogpt_meta.NAME)).is_file():
        core = alphabets.of_characters(nanogpt_meta.read_characters(meta))
        return Tokenizer(core, bos_token=data.bos_token, source=str(meta))
    if all(file.format.dtype == "u1" for file in corpus.token_files):
        return Tokenizer(alphabets.of_bytes(), bos_token=data.bos_token, source="bytes")
    return None


def load_tokenizer(data: DataConfig, corpus: Corpus) -> Tokenizer | None:
    """The tokenizer.json that data.tokenizer names; else one trained on the corpus and cached.

    "bytes" are 256 and a start token, "characters" those that the corpus has, sorted, and a start
    token only where data.bos_token names one. Of token files it is the one that they were written
    with; None where nobody knows it.
    Without data.bos_token documents start with the first that exists of _BOS_CANDIDATES. Raises
    DataError for a file that is missing, damaged, not byte-level or without such a token.
    """
    if corpus.token_files:
        return _tokenizer_of_tokens(data, corpus)
    path, vocab_size = data.tokenizer, data.tokenizer_vocab_size
    folder = files.default_cache_dir() / "tokenizers"
    if path == BYTES:
        core = alphabets.of_bytes(data.bos_token or SPECIAL_TOKENS[0])
        return Tokenizer(core, bos_token=data.bos_token, source=path)
    if path == CHARACTERS:
        core = alphabets.of_characters(_characters(corpus, folder))
        core.add_special_tokens([data.bos_token] if data.bos_token else [])
        return Tokenizer(core, bos_token=data.bos_token, source=path)
    if path is None:
        shards = json.dumps(corpus.fingerprint()["train"], sort_keys=True)
        key = hashlib.sha256(f"{SPLIT_PATTERN} {shards}".encode()).hexdigest()[:16]
        cached = folder / f"bpe{vocab_size}-{key}.json"
        if not cached.exists():
            with files.only_one(cached, needed=False):
                if not cached.exists():  # else another process was faster
                    print(f"training a tokenizer of {vocab_size} entries (once) ...", flush=True)
                    groups = RowGroups(corpus.train)
                    texts = (text for i in range(len(groups)) for text in groups[i])
                    train_tokenizer(texts, vocab_size, path=cached)
        path = str(cached)
    return read_tokenizer(Path(path).expanduser(), bos_token=data.bos_token)


def _characters(corpus: Corpus, folder: Path) -> str:
    """All characters of the corpus, those of its validation text too, sorted; kept in `folder`."""
    parts = json.dumps(corpus.fingerprint(), sort_keys=True)
    cached = folder / f"characters-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.json"
    if not cached.exists():
        with files.only_one(cached, needed=False):
            if not cached.exists():  # else another process was faster
                found: set[str] = set()
                for part in (corpus.train, corpus.val):
                    groups = RowGroups(part)
                    for i in range(len(groups)):
                        found.update(*groups[i])
                files.write_json(cached, "".join(sorted(found)))
    return json.loads(cached.read_text("utf-8"))


def read_tokenizer(path: Path, *, bos_token: str | None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; errors as in load_tokenizer."""
    if not path.is_file():
        raise DataError(
            f"data.tokenizer: there is no file {path}; give a tokenizer.json, or train one on the "
            "text by --config.data.tokenizer=train"
        )
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        reason = str(error).splitlines()[0]
        raise DataError(
            f"data.tokenizer: {path} is no tokenizer.json ({reason}); give one that is"
        ) from error
    return Tokenizer(core, bos_token=bos_token, source=str(path))


def train_tokenizer(texts: Iterator[str], vocab_size: int, *, path: Path) -> None:
    """Write a byte-level BPE of `vocab_size` entries, 256 bytes first, special tokens last.

    Fewer entries when the texts have too little to merge. Raises DataError below 265.
    """
    if vocab_size < _SMALLEST:
        raise DataError(
            f"data.tokenizer_vocab_size={vocab_size} has no room for 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens; give at least {_SMALLEST}"
        )
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_cropped(texts), trainer)
    core.add_special_tokens(list(SPECIAL_TOKENS))
    files.write_text(path, core.to_str())


def _cropped(texts: Iterator[str]) -> Iterator[str]:
    characters = 0
    for text in texts:
        yield text[:_DOCUMENT_CHARACTERS]
        characters += min(len(text), _DOCUMENT_CHARACTERS)
        if characters >= _TRAINING_CHARACTERS:
            return
