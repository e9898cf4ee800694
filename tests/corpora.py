"""Corpora and tokenizers of tests, with a cache of their own."""

import os
from unittest import mock

from looped_jax.config.settings import DataConfig
from looped_jax.data import tokenizer
from looped_jax.data.corpus import Corpus


def open_corpus(folder, cache=None, **settings):
    with mock.patch.dict(os.environ, LOOPED_JAX_CACHE=str(cache or folder)):
        return Corpus.open(DataConfig(path=str(folder), **settings))


def load_tokenizer(corpus, cache, path=None, vocab_size=300, bos_token=None):
    data = DataConfig(tokenizer=path, tokenizer_vocab_size=vocab_size, bos_token=bos_token)
    with mock.patch.dict(os.environ, LOOPED_JAX_CACHE=str(cache)):
        return tokenizer.load_tokenizer(data, corpus)
