"""nanoGPT's models of tiny Shakespeare, character by character: GPT-2's transformer in one loop.

Source: nanoGPT (Karpathy, 2022) at commit 3adf61e: config/train_shakespeare_char.py, and the flags
of its readme for a CPU.

As there: LayerNorms with gains and without biases, GELU by erf, learned positions, one matrix for
embedding and head, normal first weights, dropout, AdamW with a decay of what has two dimensions
alone, a warm-up and a cosine to a tenth of the rate, clipping, batches of rows that begin anywhere,
the first nine tenths of the text. `looped-jax download shakespeare` gets it. More loops, and fewer
layers in them, are settings: model.loops, model.layers.

Not as there: validation reads the whole text for it once, there 200 batches (20 on a CPU) of rows
that begin anywhere in it; random numbers are others; one update fewer is made, the one there after
the last validation; the vocabulary of 65 is filled up to 128, with entries that are never read.
"""

from __future__ import annotations

import math

from ml_collections import ConfigDict

_GROUPS = ("matrix", "table", "vector")


def char(config: ConfigDict) -> None:
    """10.7 M parameters, minutes on a GPU; nanoGPT's validation loss is best at about 1.47."""
    _gpt2(config, layers=6, heads=6, width=384, seq_len=256)
    parts = config.model.parts
    parts.dropout.on = parts.attention_dropout.on = True
    parts.dropout.embedding = parts.dropout.branch = parts.attention_dropout.rate = 0.2
    _train(config, steps=5_000, rows=64)


def char_cpu(config: ConfigDict) -> None:
    """0.8 M parameters, minutes on a CPU; nanoGPT's validation loss ends at about 1.90."""
    _gpt2(config, layers=4, heads=4, width=128, seq_len=64)
    config.model.dtype = "float32"
    _train(config, steps=2_000, rows=12)


def _gpt2(config: ConfigDict, *, layers: int, heads: int, width: int, seq_len: int) -> None:
    model = config.model
    model.variant, model.loops = "LT", 1
    model.layers, model.heads, model.width, model.seq_len = layers, heads, width, seq_len
    model.norm.kind, model.norm.gain, model.norm.eps = "layer", True, 1e-5
    model.norm.embedding = False
    model.mlp.activation = "gelu"
    model.rope.on, model.qk.norm = False, "none"
    model.parts.learned_positions.on = True
    model.embedding, model.soft_cap = "tied", 0.0
    model.init.embedding_std = model.init.in_std = 0.02
    model.init.out_std = 0.02 / math.sqrt(2 * layers)


def _train(config: ConfigDict, *, steps: int, rows: int) -> None:
    optim, data, train = config.optim, config.data, config.train
    optim.optimizer = "adamw"
    optim.beta1, optim.beta2, optim.eps, optim.weight_decay = 0.9, 0.99, 1e-8, 0.1
    for name in _GROUPS:
        optim.groups[name].learning_rate = 1e-3
        optim.groups[name].width_scaling = False
    optim.groups.vector.weight_decay = 0.0
    optim.warmup_steps = 101  # there the first of 100 steps has a rate, too
    optim.warmdown_steps, optim.warmdown_shape = steps - 100, "cosine"
    optim.final_lr_fraction = 0.1
    data.path, data.tokenizer, data.order = "data/shakespeare", "characters", "random"
    train.steps, train.tokens_per_step = steps, rows * config.model.seq_len
    train.batch_size = rows
    train.eval_every = train.save_every = 250
    train.eval_tokens, train.eval_loops = 111_540, (1,)  # all of the text for validation
    train.keep_best = 1
    train.sample_prompts, train.sample_tokens = ("\n", "ROMEO:"), config.model.seq_len - 8
    train.sample_temperature = 0.8


PRESETS = {"char": char, "char_cpu": char_cpu}
