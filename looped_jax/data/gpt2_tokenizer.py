"""GPT-2's tokenizer from the two files that OpenAI published, encoder.json and vocab.bpe.

tiktoken's "gpt2" is made of the same two; on the hub they are called vocab.json and merges.txt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from looped_jax import files
from looped_jax.data.datasets import RemoteFile
from looped_jax.data.fetch import fetch
from looped_jax.errors import DataError

START = "<|endoftext|>"
_FROM = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
# Checksums as tiktoken has them.
FILES = (
    RemoteFile(
        "encoder.json",
        f"{_FROM}/encoder.json",
        sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    RemoteFile(
        "vocab.bpe",
        f"{_FROM}/vocab.bpe",
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
)


def core_of(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary, token -> id, and its merges, two tokens a line, first first.

    Raises DataError for files that are something else.
    """
    try:
        lines = merges.read_text("utf-8").splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        model = models.BPE(
            vocab=json.loads(vocabulary.read_text("utf-8")),
            merges=[(left, right) for left, right in pairs],
        )
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"{vocabulary} and {merges} are no vocabulary and its merges ({error}); get them again"
        ) from error
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([START])
    return core


def download(path: Path, **settings: Any) -> None:
    """Write it to `path`, its two files beside; settings are fetch's. Raises DataError."""
    encoder, merges = (
        fetch(file.url, path.with_name(file.name), sha256=file.sha256, **settings) for file in FILES
    )
    files.write_text(path, core_of(encoder, merges).to_str())
