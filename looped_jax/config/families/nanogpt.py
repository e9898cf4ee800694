"""nanoGPT's models: GPT-2's transformer in one loop, on Shakespeare and on OpenWebText.

Source: nanoGPT (Karpathy, 2022) at commit 3adf61e: train.py's own settings (`gpt2`), those of
config/train_shakespeare_char.py (`char`), the flags of its readme for a CPU (`char_cpu`), and
config/finetune_shakespeare.py (`finetune`).

As there: LayerNorms with gains and without biases, GELU by erf, learned positions, one matrix for
embedding and head, normal first weights, dropout, AdamW with a decay of what has two dimensions
alone, a warm-up and a cosine to a tenth of the rate, clipping, batches of rows that begin anywhere,
the first nine tenths of Shakespeare, and of OpenWebText the pages that train there. `looped-jax
download` gets both. More loops, and fewer layers in them, are settings: model.loops, model.layers.

Not as there: validation reads the whole text for it once, there 200 batches (20 on a CPU) of rows
that begin anywhere in it; random numbers are others; one update fewer is made, the one there after
the last validation; the vocabulary of 65 is filled up to 128, with entries that are never read; a
page of OpenWebText begins with the token that it ends with there.

`finetune` goes on with a run, runs/gpt2 by default or RUN of `finetune@RUN`: its model, without
dropout as there, its tokenizer and its weights, at a constant rate. `looped-jax convert from-gpt2
gpt2 runs/gpt2` makes that run.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError

IMPORTED = "runs/gpt2"
_GROUPS = ("matrix", "table", "vector")
_SHAKESPEARE, _OPENWEBTEXT = 111_540, 4_434_897  # tokens that validate: characters, and GPT-2's


def char(config: ConfigDict) -> None:
    """10.7 M parameters, minutes on a GPU; nanoGPT's validation loss is best at about 1.47."""
    _gpt2(config, layers=6, heads=6, width=384, seq_len=256)
    parts = config.model.parts
    parts.dropout.on = parts.attention_dropout.on = True
    parts.dropout.embedding = parts.dropout.branch = parts.attention_dropout.rate = 0.2
    _of_characters(config, steps=5_000, rows=64)


def char_cpu(config: ConfigDict) -> None:
    """0.8 M parameters, minutes on a CPU; nanoGPT's validation loss ends at about 1.90."""
    _gpt2(config, layers=4, heads=4, width=128, seq_len=64)
    config.model.dtype = "float32"
    _of_characters(config, steps=2_000, rows=12)


def gpt2(config: ConfigDict) -> None:
    """124 M parameters, 295 B tokens of OpenWebText, days on 8 GPUs; nanoGPT ends at about 2.85."""
    _gpt2(config, layers=12, heads=12, width=768, seq_len=1024)
    config.model.vocab_size = 50_304
    data, train = config.data, config.train
    data.path, data.tokenizer, data.order = "data/openwebtext", "data/gpt2/tokenizer.json", "random"
    _optimizer(config, rate=6e-4, beta2=0.95)
    _falling(config, warmup=2_000)
    train.steps, train.batch_size = 600_000, 12
    train.tokens_per_step = train.batch_size * 40 * config.model.seq_len
    train.eval_every = train.save_every = 2_000
    train.eval_tokens, train.eval_loops = _OPENWEBTEXT, (1,)


def of_run(preset: str) -> Callable[[ConfigDict], None] | None:
    """The preset `finetune`, or `finetune@RUN`, or `finetune@RUN@STEP`; None for another name."""
    name, _, run = preset.partition("@")
    return functools.partial(_finetune, run=run or IMPORTED) if name == "finetune" else None


def _finetune(config: ConfigDict, *, run: str) -> None:
    """Its model, tokenizer and weights, 20 steps on Shakespeare. Raises ConfigError."""
    run = str(Path(run).expanduser())
    folder = Path(run.partition("@")[0])
    model, data, train = config.model, config.data, config.train
    model.update(_model_of(folder))
    model.remat = "none"
    parts = model.parts
    parts.dropout.on = parts.attention_dropout.on = False
    if parts.learned_positions.on and parts.learned_positions.length is None:
        parts.learned_positions.length = model.seq_len  # so that rows can be shorter
    data.path, data.tokenizer, data.order = (
        "data/shakespeare", str(folder / "tokenizer.json"), "random",
    )  # fmt: skip
    _optimizer(config, rate=3e-5, beta2=0.95)
    config.optim.warmdown_ratio = 0.0
    train.init_from = run
    train.steps, train.batch_size = 20, 1
    train.tokens_per_step = 32 * model.seq_len
    train.eval_every = train.save_every = 5
    train.eval_tokens, train.eval_loops = 40 * model.seq_len, (model.loops,)
    train.keep_best = train.log_every = 1
    _samples(config, tokens=min(100, model.seq_len - 8))


def _model_of(folder: Path) -> dict:
    """The model's settings in a run's folder. Raises ConfigError."""
    path = folder / "config.json"
    if not path.is_file():
        name = "gpt2" if folder == Path(IMPORTED) else "NAME"
        raise ConfigError(
            f"nanogpt:finetune goes on with the run {folder}, which is not there; make it with "
            f"looped-jax convert from-gpt2 {name} {folder}, or name another, as "
            "nanogpt:finetune@RUN"
        )
    try:
        found = json.loads(path.read_text("utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give another run") from error
    Settings.from_dict({"model": found})  # what is wrong with it is said by name
    return found


def _gpt2(config: ConfigDict, *, layers: int, heads: int, width: int, seq_len: int) -> None:
    model = config.model
    model.variant, model.loops = "LT", 1
    model.remat = "none"  # as there; one loop, run again for backward, saves no memory
    model.layers, model.heads, model.width, model.seq_len = layers, heads, width, seq_len
    model.norm.kind, model.norm.gain, model.norm.eps = "layer", True, 1e-5
    model.norm.embedding = False
    model.mlp.activation = "gelu"
    model.rope.on, model.qk.norm = False, "none"
    model.parts.learned_positions.on = True
    model.embedding, model.soft_cap = "tied", 0.0
    model.init.embedding_std = model.init.in_std = 0.02
    model.init.out_std = 0.02 / math.sqrt(2 * layers)


def _of_characters(config: ConfigDict, *, steps: int, rows: int) -> None:
    data, train = config.data, config.train
    _optimizer(config, rate=1e-3, beta2=0.99)
    _falling(config, warmup=100)
    data.path, data.tokenizer, data.order = "data/shakespeare", "characters", "random"
    train.steps, train.tokens_per_step = steps, rows * config.model.seq_len
    train.batch_size = rows
    train.eval_every = train.save_every = 250
    train.eval_tokens, train.eval_loops = _SHAKESPEARE, (1,)
    train.keep_best = 1
    _samples(config, tokens=config.model.seq_len - 8)


def _optimizer(config: ConfigDict, *, rate: float, beta2: float) -> None:
    optim = config.optim
    optim.optimizer = "adamw"
    optim.beta1, optim.beta2, optim.eps, optim.weight_decay = 0.9, beta2, 1e-8, 0.1
    for name in _GROUPS:
        optim.groups[name].learning_rate = rate
        optim.groups[name].width_scaling = False
    optim.groups.vector.weight_decay = 0.0


def _falling(config: ConfigDict, *, warmup: int) -> None:
    """From the end of the warm-up to that of the run, however long it is."""
    optim = config.optim
    optim.warmup_steps = warmup + 1  # there the first of `warmup` steps has a rate, too
    optim.warmdown_rest, optim.warmdown_shape = True, "cosine"
    optim.final_lr_fraction = 0.1


def _samples(config: ConfigDict, *, tokens: int) -> None:
    train = config.train
    train.sample_prompts, train.sample_tokens = ("\n", "ROMEO:"), tokens
    train.sample_temperature = 0.8


PRESETS = {"char": char, "char_cpu": char_cpu, "gpt2": gpt2}
