"""Presets: settings that go together, under any loop rule. The files in configs/ name them.

Whole models of the literature change them further, each in a file of families/.

All settings, their meaning and their defaults stand in settings.py. A preset changes the few that
go together; `--config.group.setting=value` changes one on the command line.
"""

from __future__ import annotations

import functools

from ml_collections import ConfigDict

from looped_jax.config import families
from looped_jax.config.families import FAMILIES
from looped_jax.config.options import either
from looped_jax.config.settings import default_config
from looped_jax.errors import ConfigError


def make(name: str, preset: str | None) -> ConfigDict:
    """The settings of a loop rule, or of a family of models, under `preset`: by default its first.

    Raises ConfigError for a preset that there is not.
    """
    check(preset, name)
    preset, config = preset or next(iter(FAMILIES.get(name, PRESETS))), default_config()
    if change := name in FAMILIES and families.find(name, preset):
        if base := families.base_preset(preset):
            PRESETS[base](config)
        change(config)
    else:
        PRESETS[preset](config)
        config.model.variant = name
    return config


def check(preset: str | None, name: str = "") -> None:
    """Raises ConfigError for a preset that there is not, of the family of that name or of rules."""
    known = FAMILIES.get(name, PRESETS)
    if preset and not (families.find(name, preset) if name in FAMILIES else preset in known):
        of_family = f" of {name}" if name in FAMILIES else ""
        named = f", {families.NAMED[name][1]}" if name in families.NAMED else ""
        raise ConfigError(
            f"preset {preset!r}{of_family} is unknown; choose {either(list(known))}{named}, or "
            "leave it out"
        )


def of_task(task: str) -> list[str]:
    """Names of the presets that learn `task`."""
    return [name for name in PRESETS if make("FLT", name).data.task == task]


@functools.cache
def of_families(variant: str, task: str) -> list[tuple[str, str]]:
    """Families of models with that loop rule, and their presets that learn `task`."""
    found = [(name, preset) for name, own in FAMILIES.items() for preset in own]
    made = {of: make(*of) for of in found}
    return [of for of, c in made.items() if (c.model.variant, c.data.task) == (variant, task)]


def paper(config: ConfigDict) -> None:
    """Paper scale: 127 M parameters, 2.54 B tokens of FineWeb-edu.

    Wants a GPU or TPU, the parquet shards of karpathy/fineweb-edu-100b-shuffle, and the
    tokenizer.json of Qwen/Qwen3-4B, in the places named here.
    """
    config.model.layers = 6  # width 384, 3 heads
    config.model.loops = 12
    config.model.seq_len = 1024
    config.data.path = "data/fineweb_edu"
    config.data.tokenizer = "data/qwen3/tokenizer.json"
    config.data.train_shards = 249
    config.data.workers = 4
    config.train.tokens_per_step = 524_288
    config.train.batch_size = 8


def one_billion(config: ConfigDict) -> None:
    """0.96 B parameters, for 64 H100 or v5p; 256 v5e take fsdp=16 and one row a device.

    Text and tokenizer as of `3b`.
    """
    _between_prelude_and_coda(config, width=2560)


def three_billion(config: ConfigDict) -> None:
    """3.48 B parameters, Huginn's scale, for 64 H100 or v5p; 256 v5e as for `1b`.

    Two layers, four looped eight times, two: a token passes 36. Weights do not fit whole beside
    their gradients, so layers gather them (model.gather), within a host of eight. Wants the
    parquet shards of karpathy/fineweb-edu-100b-shuffle; the tokenizer is trained on them, once.
    """
    _between_prelude_and_coda(config, width=5376)


def _between_prelude_and_coda(config: ConfigDict, *, width: int) -> None:
    """Heads of 128 channels; tokens_per_step serves 64 devices and 256 without micro-batches."""
    parts = config.model.parts
    parts.prelude.on = parts.coda.on = True
    parts.prelude.layers = parts.coda.layers = 2
    config.model.layers = 4
    config.model.loops = 8
    config.model.width = width
    config.model.seq_len = 4096
    config.model.gather = "layer"
    config.mesh.fsdp = 8
    config.data.path = "data/fineweb_edu"
    config.data.tokenizer = "train"
    config.data.tokenizer_vocab_size = 65_536
    config.data.workers = 4
    config.train.tokens_per_step = 1_048_576
    config.train.batch_size = 4
    config.train.eval_loops = (1, 2, 4, 8, 12)


def card_of_24_gb(config: ConfigDict) -> None:
    """Three hours on one RTX 4090 by the planner: 52 M parameters, 1.05 B tokens, 20 for each.

    Of four to eight layers, four to eight loops and widths of 384 and 512 that take at most three
    hours at 45% of the peak, the most N · K^0.46: what N looped parameters are worth in K loops by
    a fit to looped models (arXiv 2604.21106). Text as of `paper`; its tokenizer is trained.
    """
    config.model.layers = 6
    config.model.loops = 4
    config.model.width = 512
    config.model.seq_len = 1024
    config.model.remat = "none"
    config.data.path = "data/fineweb_edu"
    config.data.tokenizer = "train"
    config.data.tokenizer_vocab_size = 32_768
    config.data.workers = 2
    config.train.tokens_per_step = 262_144
    config.train.batch_size = 16
    config.train.eval_loops = (1, 2, 4, 6, 8)


def tiny(config: ConfigDict) -> None:
    """Five minutes on two cores, offline, on real text that every machine has.

    Rows are shuffled because a step is small: 4,096 tokens in a line are six documents, and what
    the model learns from a step of, say, character tables it loses again on other text.
    """
    config.model.layers = 2
    config.model.loops = 4
    config.model.width = 128
    config.model.heads = 2
    config.model.seq_len = 128
    config.model.dtype = "float32"
    config.model.remat = "auto"
    config.optim.newton_schulz_dtype = "float32"
    config.optim.warmdown_ratio = 0.6
    config.data.path = "builtin"
    config.data.shuffle_seed = 0
    config.train.steps = 400
    config.train.tokens_per_step = 4_096
    config.train.batch_size = 32
    config.train.eval_every = 100
    config.train.eval_tokens = 32_768
    config.train.eval_loops = (1, 2, 4, 8)
    config.train.save_every = 100
    config.train.sample_tokens = 48
    config.train.sample_temperature = 0.6
    # none ends with a space: a token that begins a word brings its own
    config.train.sample_prompts = (
        "import os\n\n\ndef",
        "class",
        "    def __init__(self",
        "Return the",
    )


def chain_end(config: ConfigDict) -> None:
    """Trained on chains of at most four nodes, tested on one of twelve."""
    _on_pointers(config, "chain_end", seq_len=24, steps=600)
    config.data.tasks.chain_end.nodes = 12
    config.data.tasks.chain_end.test_chains = 1


def chain_ends_16(config: ConfigDict) -> None:
    """Trained on chains of at most four nodes, tested on two of eight: no end is given away."""
    _on_pointers(config, "chain_end", seq_len=32, steps=600)
    config.optim.matrix_learning_rate = 0.01  # of four rates the best for FLT: benchmarks/hops.md
    config.data.tasks.chain_end.nodes = 16
    config.data.tasks.chain_end.test_chains = 2


def hops(config: ConfigDict) -> None:
    """One to four hops along a cycle of eight nodes."""
    _on_pointers(config, "hops", seq_len=24, steps=500)


def steps(config: ConfigDict) -> None:
    """One hop a loop along a cycle of nine nodes, with a target for every loop."""
    _on_pointers(config, "steps", seq_len=25, steps=500)
    config.model.loss = "STEP"


def _on_pointers(config: ConfigDict, task: str, *, seq_len: int, steps: int) -> None:
    """One layer looped four times, for a minute or two on one core.

    The embedding's rate matters: at the usual 0.2 rules that differ at 0.05 look alike on hops.
    """
    config.data.task = task
    config.model.layers = 1
    config.model.loops = 4
    config.model.width = 64
    config.model.heads = 2
    config.model.seq_len = seq_len
    config.model.dtype = "float32"
    config.optim.newton_schulz_dtype = "float32"
    config.optim.embedding_learning_rate = 0.05
    config.train.steps = steps
    config.train.tokens_per_step = 64 * seq_len
    config.train.batch_size = 64
    config.train.log_every = 50
    config.train.eval_every = 100
    config.train.eval_tokens = 2_048
    config.train.eval_loops = (1, 2, 4, 6, 8, 12, 16, 32)
    config.train.save_every = 100


PRESETS = {
    "paper": paper,
    "tiny": tiny,
    "1b": one_billion,
    "3b": three_billion,
    "24gb": card_of_24_gb,
    "chain_end": chain_end,
    "chain_ends_16": chain_ends_16,
    "hops": hops,
    "steps": steps,
}
