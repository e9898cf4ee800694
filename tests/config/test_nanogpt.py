"""nanoGPT's presets: its sizes, first weights and rates; and they train on its own files."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from configs import nanogpt
from looped_jax.config import presets, sources
from looped_jax.config.families import FAMILIES
from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError
from looped_jax.model import parameter_counts, transformer
from looped_jax.resolve import resolve, run_name
from looped_jax.training.optimizers import group_rates
from looped_jax.training.optimizers.base import RunScale
from looped_jax.training.optimizers.schedules import learning_rate_multiplier
from tests.data.test_token_files import nanogpt as prepared
from tests.programs import losses, run_here

# Parameters there, without the entries that fill 65 up to 128.
SIZES = {"char": 10_745_088, "char_cpu": 804_096}
STEPS = {"char": (5_000, 100, 1e-3, 0.99), "char_cpu": (2_000, 100, 1e-3, 0.99),
         "gpt2": (600_000, 2_000, 6e-4, 0.95)}  # and its warm-up, rate and beta2  # fmt: skip


def settings_of(preset):
    return Settings.from_dict(presets.make("nanogpt", preset))


@pytest.mark.parametrize("preset", SIZES)
def test_it_has_nanogpts_weights(preset):
    config = resolve(settings_of(preset), vocab_size=65)
    model = config.model
    assert Settings.from_dict(nanogpt.get_config(preset)) == settings_of(preset)
    assert (
        run_name(settings_of(preset)) == f"nanogpt-{preset}_K1_L{model.layers}_END_D{model.width}"
    )
    assert parameter_counts.count(model, "all") - 63 * model.width == SIZES[preset]
    params = transformer.init_params(model, jax.random.key(0))
    last = 0.02 / math.sqrt(2 * model.layers)  # of what adds to the stream
    for name, std in (("embed", 0.02), ("parts.learned_positions.table", 0.02),
                      ("blocks.1.attention.query", 0.02), ("blocks.1.mlp.up", 0.02),
                      ("blocks.1.attention.out", last), ("blocks.1.mlp.down", last)):  # fmt: skip
        np.testing.assert_allclose(np.std(params[name]), std, rtol=0.03)
    gains = [name for name in params if name.endswith("gain")]
    assert len(gains) == 2 * model.layers + 1 and all((params[name] == 1).all() for name in gains)
    assert not any("bias" in name for name in params)


def test_gpt2_has_nanogpts_sizes_and_batches():
    config = resolve(settings_of("gpt2"), vocab_size=50_257)
    assert FAMILIES["nanogpt"].keys() == {*SIZES, "gpt2"}
    # it prints 123.59 M, without the 1024 positions
    assert parameter_counts.count(config.model, "all") - 1024 * 768 == 123_587_328
    assert config.model.vocab_size == 50_304 and config.train.tokens_per_step == 12 * 1024 * 40
    assert not {"biases", "dropout", "attention_dropout"} & {*config.model.parts.on()}
    assert not config.model.norm.bias


@pytest.mark.parametrize("preset", STEPS)
@pytest.mark.parametrize("given", [None, 3_000])
def test_every_group_has_nanogpts_rates_and_only_matrices_and_tables_decay(preset, given):
    settings, (end, warmup, rate, beta2) = settings_of(preset), STEPS[preset]
    if given:  # as there with max_iters and lr_decay_iters alone
        train = dataclasses.replace(settings.train, steps=(end := given))
        settings = dataclasses.replace(settings, train=train)
    config = resolve(settings, vocab_size=65)
    assert config.train.steps == end
    multiplier = learning_rate_multiplier(config.optim, end)
    run = RunScale(config.model.width, end, multiplier, config.train.tokens_per_step)
    groups = {weight.group for weight in transformer.weights(config.model).values()}
    for group in groups:
        of = group_rates.of_group(config.optim, group, run, learning_rate=0.5)
        assert of.weight_decay == (0 if group == "vector" else 0.1)
        assert (of.beta1, of.beta2, of.eps) == (0.9, beta2, 1e-8)
        for step in (0, warmup // 2, warmup, warmup + 1, (end + warmup) // 2, end - 1):
            left = math.cos(math.pi * (step - warmup) / (end - warmup))
            rising = rate * (step + 1) / (warmup + 1)
            there = rising if step < warmup else rate * (0.1 + 0.9 * (1 + left) / 2)
            np.testing.assert_allclose(of.learning_rate(step), there, rtol=1e-5)
    assert groups == {"matrix", "table", "vector"}


def test_the_first_preset_is_meant_where_none_is_named():
    assert sources.read("nanogpt") == presets.make("nanogpt", "char").to_dict()
    with pytest.raises(ConfigError, match="preset 'tiny' of nanogpt is unknown; choose char, char"):
        sources.read("nanogpt:tiny")


def test_fine_tuning_without_a_run_says_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="make it with looped-jax convert from-gpt2 gpt2 runs/g"):
        sources.read("nanogpt:finetune")
    with pytest.raises(ConfigError, match="with looped-jax convert from-gpt2 NAME runs/xl, or"):
        nanogpt.get_config("finetune@runs/xl@7")
    (tmp_path / "config.json").write_text('{"model": {"layer": 2}}')
    with pytest.raises(ConfigError, match="model.layer is no setting; nearest: model.layers"):
        sources.read(f"nanogpt:finetune@{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        sources.read(f"nanogpt:finetune@{tmp_path}")


def test_it_trains_on_the_folder_that_nanogpt_prepared(home, tmp_path):
    prepared(tmp_path / "char", text="to be, or not to be: that is the question\n" * 60)
    given = (
        f"--config.data.path={tmp_path / 'char'}", "--config.data.tokenizer=train",
        "--config.train.eval_first=False", "--config.train.eval_tokens=64",
        "--config.train.eval_loops=1", "--config.model.loops=1", "--config.train.sample_tokens=0",
        "--config.optim.warmup_steps=2",
    )  # fmt: skip
    code, out, err = run_here(home, tmp_path / "run", *given, steps=10, config="nanogpt:char_cpu")
    assert code == 0, err
    assert "best            bpb" in out and "--prompt ROMEO:" in out
    found = losses(tmp_path / "run")
    assert found[1] == pytest.approx(math.log(19), abs=0.15) and found[10] < found[1] - 0.05


def test_dropout_is_on_where_nanogpt_has_it():
    rates = {}
    for preset in ("char", "char_cpu"):
        parts = settings_of(preset).model.parts
        on = [parts[name] for name in parts.on() if "dropout" in name]
        every = [dataclasses.asdict(own) | {"on": None} for own in on]
        rates[preset] = [rate for own in every for rate in own.values() if rate is not None]
    assert rates == {"char": [0.2] * 3, "char_cpu": []}
