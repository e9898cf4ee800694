"""nanochat: its model and its training, of any depth, in one loop or in several.

Source: nanochat (Karpathy, 2025) at commits b7629ef (February 2026, `seed`) and 92d63d4 (July 2026,
`head`), each at its default depth of 20. `d12` is `seed` at another depth, as `seed` is with
`--config.model.layers=12`: width, batch, rates, decay and length follow.

As there: model, optimizer, schedules, packing and what follows from depth, all of them held to
nanochat's own numbers by tests. Not as there: validation reads one stream of tokens; tables stay
in float32; checkpoints are saved along the way; no FP8. CORE is scored on whole prompts.

`loops` is `d12x4`: 12 layers, 4 loops, under FLT; any other numbers will do. Its stream is normed
between loops, for r multiplies it once a visit; its scalars take 40 steps to reach their rates, as
Adam turns the rounding noise of the first gradients into steps of full size. `laptop` is `seed` of
two layers on text that every machine has, `laptop_loops` the same in four loops. Rows of 128 tokens
are cut from one stream there, as best-fit packing would drop most of every document; rates and
decay are those of 12 layers as they stand. benchmarks/recipes.md has what both come to.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from ml_collections import ConfigDict

from looped_jax.config.depth_scaling import FEBRUARY_2026, HEAD_WIDTH, JULY_2026, Recipe

SCALAR_WARMUP = 40


def seed(config: ConfigDict) -> None:
    """Of February 2026: 20 layers, 896.5 M parameters."""
    _february(config)
    _at_scale(config, FEBRUARY_2026)


def head(config: ConfigDict) -> None:
    """Of July 2026: 20 layers, with smear and backout, and the optimizer's new options."""
    _february(config)
    _at_scale(config, JULY_2026)
    model, parts, optim = config.model, config.model.parts, config.optim
    model.short_window.share = 0.25
    model.short_window.multiple = 128
    model.rope.base = 100_000.0
    model.rope.dtype = "float32"
    model.qk.scale = 1.2
    model.init.embedding_std = 0.8
    model.init.up_scale = 0.4
    scalars, values = parts.residual_scalars, parts.value_embedding
    scalars.residual_first, scalars.residual_last = 1.15, 1.05
    scalars.input_first, scalars.input_last = 0.2, 0.05
    values.gate_scale, values.gate_channels, values.gate_bound = 3.0, 12, 0.02
    parts.smear.on = parts.backout.on = True
    optim.warmup_steps = 40
    optim.warmdown_ratio = 0.65
    optim.final_lr_fraction = 0.05
    optim.momentum_end = 0.97
    optim.momentum_warmup_steps = 400
    muon, groups = optim.optimizers.muon, optim.groups
    muon.momentum_final = 0.9
    muon.safety = 1.01
    muon.equal_rows = muon.full_norm = True
    muon.beta2 = 0.9
    muon.decay_schedule = "cosine"
    groups.head.beta2, groups.head.weight_decay = 0.96, 0.01
    groups.table.beta2, groups.table.weight_decay = 0.995, 0.001
    groups.value_table.learning_rate = JULY_2026.value_table
    groups.value_table.weight_decay = 0.01
    groups.residual_scalar.weight_decay = 0.05
    for group in (groups.smear, groups.backout):
        group.learning_rate = 0.2
        group.width_scaling = group.batch_scaling = False
    config.train.eval_tokens = 80 * 524_288


def loops(config: ConfigDict) -> None:
    """Of February 2026, 12 layers in 4 loops: 286.3 M parameters."""
    _of_size(config, 12, 4)


def laptop(config: ConfigDict) -> None:
    """Two layers on two cores, offline."""
    _february(config)
    config.data.packing = "stream"
    config.train.eval_loops = (1,)


def laptop_loops(config: ConfigDict) -> None:
    """The same in four loops."""
    laptop(config)
    _in_loops(config, 4)
    config.train.eval_loops = (1, 2, 4, 8)


def of_size(preset: str) -> Callable[[ConfigDict], None] | None:
    """The preset of a depth, as d12, or of a depth and loops, as d12x4; None for another name."""
    size = re.fullmatch(r"d([1-9]\d*)(?:x([1-9]\d*))?", preset)
    return size and functools.partial(_of_size, layers=int(size[1]), loops=int(size[2] or 1))


def _of_size(config: ConfigDict, layers: int, loops: int) -> None:
    seed(config)
    config.model.layers = layers
    if loops > 1:
        _in_loops(config, loops)
        config.train.eval_loops = tuple(range(1, loops + 1))


def _february(config: ConfigDict) -> None:
    """Model, optimizer and packing, whatever the size."""
    model, parts, optim = config.model, config.model.parts, config.optim
    model.variant = "LT"
    model.loops = 1
    model.window_pattern = "SSSL"
    model.short_window.share = 0.5
    model.short_window.beside_itself = True
    parts.residual_scalars.on = parts.carried_scale.on = True
    parts.value_embedding.on = parts.value_embedding.gate = True
    parts.value_embedding.layers = "alternate"
    parts.value_embedding.table_scale = 1.0
    optim.embedding_learning_rate = FEBRUARY_2026.table
    optim.grad_clip_norm = 0.0
    optim.warmdown_ratio = 0.5
    muon, groups = optim.optimizers.muon, optim.groups
    muon.orthogonalisation = "polar_express"
    muon.normuon = muon.cautious = True
    muon.weight_decay = FEBRUARY_2026.weight_decay
    muon.decay_schedule = "linear"
    groups.residual_scalar.learning_rate = FEBRUARY_2026.residual_scalar
    groups.input_scalar.learning_rate = FEBRUARY_2026.input_scalar
    groups.input_scalar.beta1 = 0.96
    groups.residual_scalar.width_scaling = groups.input_scalar.width_scaling = False
    config.data.packing = "best_fit"


def _at_scale(config: ConfigDict, recipe: Recipe) -> None:
    """Sizes, data and how often what happens; the rates are those of 12 layers."""
    model, optim, train = config.model, config.optim, config.train
    model.layers = 20
    model.head_width = HEAD_WIDTH
    model.seq_len = 2048
    model.long_window = model.seq_len + 1
    optim.head_learning_rate = recipe.head
    optim.optimizers.muon.weight_decay = recipe.weight_decay
    config.data.path = "data/fineweb_edu"
    config.data.tokenizer_vocab_size = 32_768
    config.data.workers = 4
    train.seed = 42
    train.tokens_per_parameter = recipe.tokens_per_parameter
    train.scaled_by = "unique"
    train.scaled_from_layers = 12
    train.tokens_per_step = recipe.batch_tokens
    train.batch_size = 16
    train.eval_tokens = 40 * 524_288
    train.eval_loops = (1,)
    train.core_every = train.sample_every = 2000
    train.sample_tokens = 16
    train.sample_prompts = (
        "The capital of France is",
        "The chemical symbol of gold is",
        "If yesterday was Friday, then tomorrow will be",
        "The opposite of hot is",
        "The planets of the solar system are:",
        "My favorite color is",
        "If 5*x + 3 = 13, then x is",
    )


def _in_loops(config: ConfigDict, loops: int) -> None:
    config.model.variant = "FLT"
    config.model.loops = loops
    config.model.parts.carried_scale.on = False
    groups = config.optim.groups
    groups.residual_scalar.warmup_steps = groups.input_scalar.warmup_steps = SCALAR_WARMUP


PRESETS: dict[str, Callable[[ConfigDict], None]] = {
    "seed": seed,
    "head": head,
    "loops": loops,
    "laptop": laptop,
    "laptop_loops": laptop_loops,
}
