"""From settings as they are given to the configuration of a run: sizes, length and folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from looped_jax.config import depth_scaling, horizon, presets
from looped_jax.config.families import FAMILIES
from looped_jax.config.options import Optimizers, WeightGroups, either
from looped_jax.config.resolved import Config, ModelConfig, TrainConfig
from looped_jax.config.setting_tree import plain
from looped_jax.config.settings import (
    PARAMETER_COUNTS,
    PERFORMANCE,
    ModelSettings,
    OptimConfig,
    Settings,
)
from looped_jax.errors import ConfigError
from looped_jax.model import loop_costs, parameter_counts
from looped_jax.model.weight_groups import lineage

# Settings that the first part of a name holds.
NAMED = {
    f"model.{name}"
    for name in ("variant", "loops", "layers", "loss", "width", "attention", "latent_rank",
                 "kv_heads", "window_pattern")
} | {"data.task"}  # fmt: skip
DATA = ("task", "path", "val_shard", "val_share", "train_shards", "shuffle_seed", "order",
        "tokenizer", "tokenizer_vocab_size", "bos_token", "packing")  # fmt: skip
TRAIN = ("seed", "steps", "target_flops", "tokens_per_parameter", "scaled_by", "scaled_from_layers",
         "tokens_per_step", "init_from", "init_optimizer")  # fmt: skip
LONGEST = 40  # of what differs from the preset, then a hash stands for it


def resolve(settings: Settings, *, vocab_size: int | None = None) -> Config:
    """The run that `settings` describe, where the tokenizer has `vocab_size` entries.

    None takes model.vocab_size, as a run's own config.json has it. The length is by default 20
    tokens per parameter (Hoffmann et al., "Training compute-optimal large language models", 2022).
    With train.scaled_from_layers batch, rates and decay are those that follow from it; the result
    no longer asks for it. Raises ConfigError for sizes that do not divide or contradict each other,
    and for an objective that does not fit them.
    """
    m, train, optim = settings.model, settings.train, settings.optim
    vocab_size = vocab_size or m.vocab_size
    if vocab_size is None:
        raise ConfigError("model.vocab_size is missing; give the tokenizer's number of entries")
    if m.vocab_size is not None and m.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={m.vocab_size} is smaller than the tokenizer's {vocab_size} "
            "entries; leave it out or raise it"
        )
    model = _model(m, vocab_size)
    model.scored_loops()  # an objective that does not fit the model says so
    tokens_per_step = train.tokens_per_step
    if train.scaled_from_layers is not None:
        scale, reference = scale_of(settings, model)
        tokens_per_step, optim = scale.batch_tokens, _scaled(optim, scale, reference)
    steps = horizon.steps(
        train,
        tokens_per_step=tokens_per_step,
        parameters=lambda: parameter_counts.count(model, train.scaled_by),
        flops_per_token=lambda: loop_costs.run_flops(
            model, train.loop_sampling, rows=_rows_together(settings)
        ),
    )
    if (falling := optim.warmdown_steps or 0) > steps:
        raise ConfigError(
            f"optim.warmdown_steps={falling} is longer than the run, of {steps} steps: rates would "
            f"fall from the first step on; give {steps} or fewer"
        )
    run_dir = train.run_dir or f"runs/{run_name(settings)}"
    resolved = TrainConfig(
        **_fields(train)
        | {"steps": steps, "run_dir": run_dir}
        | {"tokens_per_step": tokens_per_step, "scaled_from_layers": None}
    )
    return Config(**_fields(settings) | {"model": model, "optim": optim, "train": resolved})


def _model(m: ModelSettings, vocab_size: int) -> ModelConfig:
    """With its sizes. Raises ConfigError."""
    whole = m.head_width or 1
    width = m.width or math.ceil(m.width_per_layer * m.layers / whole) * whole
    heads, kv_heads = _heads(m, width)
    return ModelConfig(
        **_fields(m)
        | {"width": width, "heads": heads, "kv_heads": kv_heads}
        | {"vocab_size": m.vocab_size or vocab_size}
    )


def scale_of(settings: Settings, model: ModelConfig) -> tuple[depth_scaling.Scale, int]:
    """What follows from train.scaled_from_layers for `model`, and B_ref.

    Its reference is the same model of so many layers in one loop. train.tokens_per_step is B_ref,
    unless optim.reference_batch_tokens is given: then it is B. Raises ConfigError for a width that
    does not follow from layers.
    """
    m, train, given = settings.model, settings.train, settings.optim.reference_batch_tokens
    layers = train.scaled_from_layers
    assert layers is not None
    for name in ("width", "heads", "kv_heads"):
        if (value := getattr(m, name)) is not None:
            raise ConfigError(
                f"train.scaled_from_layers={layers}: the model of {layers} layers has another "
                f"width, and model.{name}={value} would be as here; leave it out, and give "
                "model.width_per_layer and model.head_width"
            )
    reference = _model(dataclasses.replace(m, layers=layers, loops=1), model.vocab_size)
    tokens, reference_tokens = (
        depth_scaling.tokens(
            train.tokens_per_parameter, parameter_counts.count(each, train.scaled_by)
        )
        for each in (model, reference)
    )
    if not tokens:
        raise ConfigError(
            f"train.tokens_per_parameter={train.tokens_per_parameter} is no token for this model; "
            "raise it: train.scaled_from_layers goes by it"
        )
    batch = None if given is None else train.tokens_per_step
    known = given or train.tokens_per_step
    return depth_scaling.scale(tokens, reference_tokens, known, batch), known


def _scaled(optim: OptimConfig, scale: depth_scaling.Scale, reference_batch: int) -> OptimConfig:
    """Rates for another batch, which the groups of weights heed, and Muon's decay."""
    kinds, groups = dict(optim.optimizers), dict(optim.groups)
    if optim.optimizer == "muon":
        muon = kinds["muon"]
        kinds["muon"] = dataclasses.replace(muon, weight_decay=scale.decay * muon.weight_decay)
        for name, group in groups.items():
            if group.weight_decay is not None and lineage(name)[-1] == "matrix":
                decay = scale.decay * group.weight_decay
                groups[name] = dataclasses.replace(group, weight_decay=decay)
    return dataclasses.replace(
        optim,
        reference_batch_tokens=reference_batch,
        optimizers=Optimizers(kinds),
        groups=WeightGroups(groups),
    )


def _rows_together(settings: Settings) -> int:
    """Rows of a micro-batch on the devices that the mesh names; an axis left open counts once."""
    return settings.train.batch_size * max(settings.mesh.data, 1) * max(settings.mesh.fsdp, 1)


def describe_scale(settings: Settings, config: Config) -> list[str]:
    """Lines for the console: the parameter counts, and what follows from them."""
    train, model = settings.train, config.model
    counts = {how: parameter_counts.count(model, how) for how in PARAMETER_COUNTS}
    told = ", ".join(f"{how} {number:,}" for how, number in counts.items())
    lines = [
        f"parameters by count: {told}; train.scaled_by={train.scaled_by}",
        f"{config.train.steps:,} steps of {config.train.tokens_per_step:,} tokens, by "
        f"{horizon.reason(train)}",
    ]
    if train.scaled_from_layers is not None:
        scale, reference = scale_of(settings, model)
        lines.append(
            f"scaled from {train.scaled_from_layers} layers: {scale.batch_tokens:,} tokens a step "
            f"for {reference:,}, rates × {scale.rates:.4f}, decay of matrices × {scale.decay:.4f}"
        )
    return lines


def _heads(m: ModelSettings, width: int) -> tuple[int, int]:
    """H and G. Raises ConfigError for what does not divide."""
    heads = _own_width(m, width) if m.head_width else _of_width(m, width)
    kv_heads = m.kv_heads or heads
    if heads % kv_heads:
        raise ConfigError(
            f"model.kv_heads={kv_heads} does not divide model.heads={heads}; "
            f"choose {either([h for h in range(1, heads + 1) if heads % h == 0])}"
        )
    return heads, kv_heads


def _own_width(m: ModelSettings, width: int) -> int:
    """H of heads whose width is given."""
    assert m.head_width is not None
    if m.head_width % 2:
        raise ConfigError(
            f"model.head_width={m.head_width} is odd, and rotary positions pair channels; "
            f"choose {m.head_width + 1}"
        )
    if m.heads is None and width % m.head_width:
        raise ConfigError(
            f"model.head_width={m.head_width} does not divide model.width={width}; "
            "give model.heads too, or another width"
        )
    return m.heads or width // m.head_width


def _of_width(m: ModelSettings, width: int) -> int:
    """H of heads that the width is cut into."""
    fits = [h for h in range(1, width + 1) if width % h == 0 and width // h % 2 == 0]
    if not fits:
        raise ConfigError(
            f"model.width={width} is odd, so no head has an even width; choose {width + 1}"
        )
    heads = m.heads or next(h for h in fits if h >= min(math.ceil(width / 128), fits[-1]))
    if heads not in fits:
        near = sorted(sorted(fits, key=lambda h: abs(h - heads))[:4])
        raise ConfigError(
            f"model.heads={heads} does not cut model.width={width} into heads of an even width; "
            f"choose {either(near)}; or give model.head_width"
        )
    return heads


def _fields(settings: Any) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}


def run_name(config: Settings) -> str:
    """A name for what `config` trains, before it is resolved, such as `FLT_K12_L6_END`.

    The model first, a family's name where that is nearer than its rule's, and where the task is not
    text behind its nearest preset's name or its own; then whatever else matters to the result and
    is not as the nearest preset has it: `FLT_K4_L2_END_D128_seed1`. Two runs that differ in their
    result differ in their name.
    """
    m, task = config.model, config.data.task
    own = presets.of_task(task)
    bases = [(m.variant, preset) for preset in own or presets.of_task("text")]
    bases += presets.of_families(m.variant, task)
    compared = {base: _different(config, *base) for base in bases}
    (name, preset), (parted, different) = min(compared.items(), key=lambda of: sum(map(len, of[1])))
    parts = [] if task == "text" else [preset if own else task]
    if name in FAMILIES and preset not in presets.PRESETS:
        name = f"{name}-{preset}"
    parts += [name, f"K{m.loops}", f"L{m.layers}", m.loss]
    parts += [f"D{m.width}"] if m.width else []
    parts += [f"mla{m.latent_rank}"] if m.attention == "mla" else []
    parts += [f"kv{m.kv_heads}"] if m.kv_heads else []
    parts += [f"win{m.window_pattern}"] if "S" in m.window_pattern else []
    parts += parted
    told = [f"{key.rpartition('.')[2]}{_short(value)}" for key, value in different.items()]
    if len("_".join(told)) > LONGEST:
        told = [hashlib.sha256(json.dumps(plain(different)).encode()).hexdigest()[:8]]
    return "_".join([*parts, *told])


def _different(config: Settings, name: str, preset: str) -> tuple[list[str], dict[str, Any]]:
    """Parts that the preset has not, or alone has, and settings of other values than its own.

    Those that matter to the result, beside NAMED ones.
    """
    base = Settings.from_dict(presets.make(name, preset))
    ours, theirs, values = config.model.parts.on(), base.model.parts.on(), base.leaves()
    parted = [part for part in ours if part not in theirs]
    parted += [f"no-{part}" for part in theirs if part not in ours]
    return parted, {
        key: value
        for key, value in config.leaves().items()
        if matters(key)
        and key not in NAMED
        and not key.endswith(".on")
        and value != values.get(key)
    }


def matters(key: str) -> bool:
    """Whether the setting of a dotted name changes what is trained."""
    told = {*(f"data.{name}" for name in DATA), *(f"train.{name}" for name in TRAIN)}
    fast = {f"model.{name}" for name in PERFORMANCE}
    groups = ("model.", "optim.", "data.tasks.", "data.packings.", "train.loop_sampling.")
    return (key in told or key.startswith(groups)) and key not in fast


def _short(value: Any) -> str:
    """A setting as part of a file's name: of a path its last part and a hash of the whole."""
    text = str(value)
    if "/" in text:
        text = f"-{Path(text).name}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"
    return re.sub(r"[^A-Za-z0-9.+-]", "-", text)
