"""A small story teller: a plain transformer of 1.85 M parameters trained on TinyStories.

Source: ajay99511/DL_Algorithms, folder pretrain/, at commit 49f5e83; its README says 3.5 M. The
stories are TinyStories (Eldan and Li, 2023): `looped-jax download tinystories --documents 50000`.

As there: LayerNorms with gains and biases, GELU by erf, learned positions, one matrix for embedding
and head, biases in the MLP alone, every matrix and table normal with 0.02 at first, dropout 0.1,
AdamW with a decay of everything, a warm-up and a cosine to a tenth of the rate, clipping, rows of
256 tokens, which give 255 predictions, 256 of them in a step, a vocabulary of 8,000.

Not as there: stories validate whole, and the tokenizer has not seen them, where there one story may
stand on both sides; a token stands between stories; the first update has a 500th of the rate, not
none; first weights, rows and dropout are drawn by another generator; the last token of a row is
the first of the next; a run goes on where it stopped, not from its best checkpoint.

`minutes` is a smaller one on text that every machine has, without dropout, as it sees little twice.
`loop` is one layer in four loops, under FLT, for the FLOPs of the four layers of `seed`. `d2x2` is
two layers twice, and any other numbers will do.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from ml_collections import ConfigDict

_GROUPS = ("matrix", "table", "vector")


def seed(config: ConfigDict) -> None:
    """1,848,064 parameters, 10,000 steps of 65,280 predictions: wants a GPU."""
    _model(config, positions=256)
    _train(config, rate=3e-4, warmup=0.05)
    model, data, train = config.model, config.data, config.train
    model.seq_len = 255
    for part in (model.parts.dropout, model.parts.attention_dropout):
        part.on = True  # at 0.1, in four places
    data.path, data.tokenizer_vocab_size = "data/tinystories/first_50000.parquet", 8_000
    data.shuffle_seed = train.seed = 42
    train.steps, train.batch_size = 10_000, 16
    train.tokens_per_step = 256 * model.seq_len
    train.eval_every = train.save_every = 500
    train.sample_tokens = 200
    train.sample_prompts = ("Once upon a time", "One day, a little girl named Lily")


def loop(config: ConfigDict) -> None:
    """One layer in four loops, for the FLOPs of `seed`: 1,254,784 parameters."""
    _of_size(config, 1, 4)


def minutes(config: ConfigDict) -> None:
    """Four layers on two cores, offline, on sources and documentation of Python."""
    _model(config, positions=128)
    _train(config, rate=1e-3, warmup=0.05)
    data, train = config.data, config.train
    data.path, data.tokenizer_vocab_size, data.shuffle_seed = "builtin", 2_048, 0
    config.model.seq_len = 128
    train.steps, train.batch_size = 1_000, 32
    train.tokens_per_step = train.batch_size * config.model.seq_len
    train.eval_every = train.save_every = 250
    train.eval_tokens = 32_768
    train.sample_tokens = 48
    # none ends with a space: a token that begins a word brings its own
    train.sample_prompts = ("import os\n\n\ndef", "    def __init__(self", "Return the")


def of_size(preset: str) -> Callable[[ConfigDict], None] | None:
    """The preset of so many layers, as d4, or layers and loops, as d2x2; None for another name."""
    size = re.fullmatch(r"d([1-9]\d*)(?:x([1-9]\d*))?", preset)
    return size and functools.partial(_of_size, layers=int(size[1]), loops=int(size[2] or 1))


def _of_size(config: ConfigDict, layers: int, loops: int) -> None:
    seed(config)
    config.model.layers, config.model.loops = layers, loops
    if loops > 1:
        config.model.variant, config.model.remat = "FLT", "loop"
        config.train.eval_loops = tuple(range(1, loops + 1))


def _model(config: ConfigDict, *, positions: int) -> None:
    """Whatever the length: 1 layer of it has 197,760 parameters."""
    model = config.model
    model.variant, model.loops = "LT", 1
    model.layers, model.heads, model.width = 4, 4, 128
    model.dtype = "float32"
    model.remat = "none"  # as there; one loop, run again for backward, saves no memory
    model.norm.kind, model.norm.gain, model.norm.bias, model.norm.eps = "layer", True, True, 1e-5
    model.norm.embedding = False
    model.mlp.activation = "gelu"
    model.rope.on, model.qk.norm = False, "none"
    model.embedding, model.soft_cap = "tied", 0.0
    model.init.embedding_std = model.init.in_std = model.init.out_std = 0.02
    parts = model.parts
    parts.learned_positions.on, parts.learned_positions.length = True, positions
    parts.biases.on, parts.biases.attention = True, False


def _train(config: ConfigDict, *, rate: float, warmup: float) -> None:
    optim, train = config.optim, config.train
    optim.optimizer = "adamw"
    optim.beta1, optim.beta2, optim.eps, optim.weight_decay = 0.9, 0.95, 1e-8, 0.1
    for name in _GROUPS:
        optim.groups[name].learning_rate = rate
        optim.groups[name].width_scaling = False
    optim.warmup_ratio, optim.warmdown_ratio, optim.warmdown_shape = warmup, 1 - warmup, "cosine"
    optim.final_lr_fraction = 0.1
    train.eval_loops, train.keep_best = (1,), 1
    train.sample_temperature = 0.8


PRESETS = {"seed": seed, "minutes": minutes, "loop": loop}
