"""Text to token ids and back: any byte-level `tokenizer.json`, or one trained on the corpus."""

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
from looped_jax.data.corpus import Corpus, RowGroups
from looped_jax.errors import DataError

# nanochat's: GPT-4's pattern, but digits in groups of one or two. The `+` after a quantifier makes
# it possessive.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
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
_SMALLEST = 256 + len(SPECIAL_TOKENS)


class Tokenizer:
    """A byte-level tokenizer with its document start, stop tokens and byte lengths.

    Special strings inside a text are ordinary text. Picklable, for worker processes.
    """

    def __init__(self, core: tokenizers.Tokenizer, *, bos_token: str | None, source: str):
        if not isinstance(core.decoder, decoders.ByteLevel):
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
        if not found:
            raise DataError(
                f"data.bos_token: {source} has no special token {' or '.join(wanted)}; "
                f"choose one of {', '.join(specials) or 'none: it has no special tokens'}"
            )
        self.bos_token, self.bos_id = found[0], specials[found[0]]
        stops = {specials[t] for t in _STOP_CANDIDATES if t in specials}
        self.stop_ids = frozenset({self.bos_id, *stops})

    def __reduce__(self):
        return _rebuild, (self.to_json(), self.bos_token)

    @functools.cached_property
    def vocab_size(self) -> int:
        """V: one more than the largest id."""
        return max(self._core.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._core.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """[BOS] + tokens of each text, int32."""
        encoded = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([self.bos_id, *e.ids], np.int32) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._core.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Raw bytes of each token, int32 [V]; 0 for special tokens and unused ids."""
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, index in self._core.get_vocab(with_added_tokens=False).items():
            sizes[index] = len(token)  # one character of the byte-level alphabet is one byte
        for index, added in self._added.items():
            sizes[index] = 0 if added.special else len(added.content.encode())
        return sizes

    def to_json(self) -> str:
        return self._core.to_str()

    def fingerprint(self) -> dict[str, Any]:
        """What two tokenizers that cut all text alike share; ready for JSON."""
        canonical = json.dumps(json.loads(self.to_json()), sort_keys=True)
        return {
            "sha256": hashlib.sha256(canonical.encode()).hexdigest(),
            "vocab_size": self.vocab_size,
            "bos_token": self.bos_token,
        }


def _rebuild(text: str, bos_token: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text), bos_token=bos_token, source="a copy")


def load_tokenizer(data: DataConfig, corpus: Corpus) -> Tokenizer:
    """The tokenizer.json that data.tokenizer names; else one trained on the corpus and cached.

    Without data.bos_token documents start with the first that exists of _BOS_CANDIDATES. Raises
    DataError for a file that is missing, damaged, not byte-level or without such a token.
    """
    path, vocab_size = data.tokenizer, data.tokenizer_vocab_size
    if path is None:
        shards = json.dumps(corpus.fingerprint()["train"], sort_keys=True)
        key = hashlib.sha256(f"{SPLIT_PATTERN} {shards}".encode()).hexdigest()[:16]
        folder = files.default_cache_dir() / "tokenizers"
        cached = folder / f"bpe{vocab_size}-{key}.json"
        if not cached.exists():
            print(f"training a tokenizer of {vocab_size} entries (once) ...", flush=True)
            groups = RowGroups(corpus.train)
            texts = (text for i in range(len(groups)) for text in groups[i])
            train_tokenizer(texts, vocab_size, path=cached)
        path = str(cached)
    return read_tokenizer(Path(path).expanduser(), bos_token=data.bos_token)


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
