"""Tokenizers that merge nothing: every character, or every byte, is a token.

They are written as any other `tokenizer.json`, so whoever reads those reads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers


def of_characters(characters: Sequence[str]) -> tokenizers.Tokenizer:
    """Token i is `characters[i]`; there is no start token."""
    vocabulary = {character: i for i, character in enumerate(characters)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.decoder = decoders.Fuse()
    return core


def of_bytes(start: str | None = None) -> tokenizers.Tokenizer:
    """Token i is byte i; the start token, if there is one, comes behind them."""
    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if start is not None:
        core.add_special_tokens([start])
    return core


def _letters() -> list[str]:
    """Which character stands for each byte: printable ones for themselves, others from 256 on."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    others = iter(sorted(letter for letter in alphabet if ord(letter) > 255))
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
