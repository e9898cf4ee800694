"""What follows from depth, against nanochat's own numbers for 4 to 26 layers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from looped_jax.config import depth_scaling, presets
from looped_jax.config.depth_scaling import FEBRUARY_2026, JULY_2026, REFERENCE_WIDTH
from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError
from looped_jax.model import parameter_counts, transformer
from looped_jax.resolve import describe_scale, resolve

GOLDEN = Path(__file__).parents[1] / "golden" / "nanochat"
RECIPES = {"seed": FEBRUARY_2026, "head": JULY_2026}


def table(name):
    """Columns by name, float64 [23], a row for each depth."""
    golden = np.load(GOLDEN / f"depth_table_{name}.npz")
    return dict(zip(golden["columns"].tolist(), golden["table"].T, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_everything_that_follows_from_depth_is_nanochats(name):
    wanted, recipe = table(name), RECIPES[name]
    assert wanted["depth"].tolist() == list(range(4, 27))
    counts = dict(zip(wanted["depth"], wanted["scaling_params"], strict=True))
    reference = depth_scaling.tokens(recipe.tokens_per_parameter, counts[12])
    for row, (depth, count) in enumerate(counts.items()):
        width = depth_scaling.width(int(depth))
        tokens = depth_scaling.tokens(recipe.tokens_per_parameter, count)
        scale = depth_scaling.scale(tokens, reference, recipe.batch_tokens)
        of_width = (width / REFERENCE_WIDTH) ** -0.5
        found = {
            "n_embd": width,
            "n_head": width / depth_scaling.HEAD_WIDTH,
            "target_tokens": tokens,
            "batch_tokens": scale.batch_tokens,
            "iterations": tokens // scale.batch_tokens,
            "lr_scale_batch": scale.rates,
            "weight_decay": recipe.weight_decay * scale.decay,
            "dmodel_lr_scale": of_width,
            "lr_lm_head": recipe.head * of_width * scale.rates,
            "lr_wte": recipe.table * of_width * scale.rates,
            "lr_value_embeds": recipe.value_table * of_width * scale.rates,
            "lr_resid": recipe.residual_scalar * scale.rates,
            "lr_x0": recipe.input_scalar * scale.rates,
            "lr_matrix": recipe.matrix * scale.rates,
        }
        for column, value in found.items():
            assert value == pytest.approx(wanted[column][row], rel=1e-9), (depth, column)


def nanochat(name, layers, **train):
    """Its model of that many layers, as docs/from_nanochat.md has it."""
    config = presets.make("LT", "paper")
    m, parts = config.model, config.model.parts
    m.layers, m.loops, m.head_width, m.seq_len = layers, 1, 128, 2048
    m.window_pattern, m.long_window, m.short_window.beside_itself = "SSSL", 2049, True
    m.short_window.share = {"seed": 0.5, "head": 0.25}[name]
    values = parts.value_embedding
    values.on, values.gate, values.layers = True, True, "alternate"
    values.gate_channels = {"seed": 32, "head": 12}[name]
    parts.residual_scalars.on = parts.carried_scale.on = True
    parts.smear.on = parts.backout.on = name == "head"
    config.train.tokens_per_parameter = RECIPES[name].tokens_per_parameter
    config.optim.optimizers.muon.weight_decay = RECIPES[name].weight_decay
    config.train.scaled_by, config.train.scaled_from_layers = "unique", 12
    config.train.update(train)
    return Settings.from_dict(config)


@pytest.mark.parametrize(("name", "layers"), [("seed", 4), ("seed", 19), ("head", 5)])
def test_a_run_scaled_from_twelve_layers_is_nanochats(name, layers):
    wanted = {column: values[layers - 4] for column, values in table(name).items()}
    config = resolve(nanochat(name, layers), vocab_size=32_768)
    model, train = config.model, config.train
    assert (model.width, model.heads) == (wanted["n_embd"], wanted["n_head"])
    assert parameter_counts.count(model, "all") == wanted["total_params"]
    assert parameter_counts.count(model, "unique") == wanted["scaling_params"]
    weights = transformer.weights(model)
    sizes = {
        kind: sum(w.size for w in weights.values() if w.group == kind)
        for kind in ("matrix", "head", "value_table")
    }
    of = ("transformer_matrices", "lm_head", "value_embeds")
    assert tuple(sizes.values()) == tuple(wanted[column] for column in of)
    assert (train.tokens_per_step, train.steps) == (wanted["batch_tokens"], wanted["iterations"])
    batches = train.tokens_per_step / config.optim.reference_batch_tokens
    assert batches**0.5 == pytest.approx(wanted["lr_scale_batch"], rel=1e-9)
    decay = config.optim.optimizers["muon"].weight_decay
    assert decay == pytest.approx(wanted["weight_decay"], rel=1e-9)
    linear = sizes["matrix"] + sizes["head"] + (24 if name == "head" else 0)  # 24: of the smear
    keys = [2048 if window is None else min(window - 1, 2048) for window in model.windows()]
    flops = 6 * linear + 12 * model.width * sum(keys)
    assert flops == pytest.approx(wanted["flops_per_token"], rel=1e-9)


def test_loops_scale_from_one_loop_and_the_count_says_by_how_much():
    """Of a model as deep as its reference, so that loops alone differ."""
    settings = dataclasses.replace(
        nanochat("seed", 12), model=dataclasses.replace(nanochat("seed", 12).model, loops=4)
    )
    assert resolve(settings, vocab_size=32_768).train.tokens_per_step == 2**19
    train = dataclasses.replace(settings.train, scaled_by="usage_weighted")
    settings = dataclasses.replace(settings, train=train)
    config = resolve(settings, vocab_size=32_768)
    looped = (4 * 84_935_808 + 25_165_824) / 110_101_632
    assert config.train.tokens_per_step == 2 ** round(19 + 0.383 * np.log2(looped)) == 2**20
    assert config.train.steps == int(10.5 * looped * 110_101_632) // 2**20
    told = "\n".join(describe_scale(settings, config))
    assert "scaled from 12 layers: 1,048,576 tokens a step for 524,288, rates × 1.4142" in told
    assert f"decay of matrices × {2**0.5 / looped:.4f}" in told


def test_a_resolved_run_resolves_to_itself():
    config = resolve(nanochat("seed", 4), vocab_size=32_768)
    again = resolve(Settings.from_dict(config_as_settings(config)), vocab_size=32_768)
    assert again.train == config.train and again.optim == config.optim


def config_as_settings(config):
    values = config.to_dict()
    for name in ("width", "heads", "kv_heads", "vocab_size"):
        values["model"].pop(name)
    return values


def test_a_batch_that_is_given_is_taken_and_rates_follow():
    settings = nanochat("seed", 4, tokens_per_step=2**17)
    optim = dataclasses.replace(settings.optim, reference_batch_tokens=2**19)
    config = resolve(dataclasses.replace(settings, optim=optim), vocab_size=32_768)
    assert (config.train.tokens_per_step, config.optim.reference_batch_tokens) == (2**17, 2**19)


def test_decay_of_matrices_alone_is_scaled():
    settings = nanochat("seed", 4)
    config = settings.to_dict()
    config["optim"]["groups"] = {"matrix": {"weight_decay": 0.3}, "table": {"weight_decay": 0.1}}
    groups = resolve(Settings.from_dict(config), vocab_size=32_768).optim.groups
    factor = table("seed")["weight_decay"][0] / 0.2
    assert groups["matrix"].weight_decay == pytest.approx(0.3 * factor, rel=1e-9)
    assert groups["table"].weight_decay == 0.1 and groups["head"].weight_decay is None


def test_what_does_not_follow_from_layers_is_refused():
    settings = nanochat("seed", 4)
    wide = dataclasses.replace(settings, model=dataclasses.replace(settings.model, width=256))
    with pytest.raises(ConfigError, match="model.width=256 would be as here; leave it out"):
        resolve(wide, vocab_size=32_768)
    none = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, tokens_per_parameter=0.0)
    )
    with pytest.raises(ConfigError, match="train.tokens_per_parameter=0.0 is no token"):
        resolve(none, vocab_size=32_768)
