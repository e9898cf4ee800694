"""Whole models: each is what its file says, trains, decodes exactly, and has its paper's size."""

import dataclasses
import re

import numpy as np
import pytest

from configs import huginn, middle, ouro, parcae, universal
from looped_jax import cli
from looped_jax.config import presets, sources
from looped_jax.config.families import FAMILIES
from looped_jax.config.resolved import micro_batches
from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError
from looped_jax.model import parameter_counts, transformer
from looped_jax.resolve import resolve, run_name
from looped_jax.training.loop_sampler import LoopSampler
from tests.model.test_part import TOKENS, check_decoding, loud
from tests.programs import ROOT, losses, run_here

FILES = {"huginn": huginn, "parcae": parcae, "ouro": ouro, "universal": universal, "middle": middle}
# As built here, and in the paper; docs/models.md says where they differ.
SIZES = {
    "huginn": (3_424_227_840, 3.56e9),
    "parcae": (143_721_984, 140e6),
    "ouro": (1_409_386_497, 1.43e9),
    "universal": (79_693_824, None),
    "middle": (40_108_032, 35.9e6),
}


LOOPED = [name for name, own in FAMILIES.items() if "paper" in own]
QUICK = ("huginn", "universal")  # to train: between them they have most of what the others have


def settings_of(name, preset):
    return Settings.from_dict(presets.make(name, preset))


def resolved(name, preset, **model):
    settings = settings_of(name, preset)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **model))
    return resolve(settings, vocab_size=settings.data.tokenizer_vocab_size)


def small(name):
    """The tiny preset, smaller still, for the tokens of other tests."""
    sizes = {"width": 32, "heads": 4, "seq_len": 12, "vocab_size": 97}
    settings = settings_of(name, "tiny")
    model = dataclasses.replace(settings.model, **sizes)
    return resolve(dataclasses.replace(settings, model=model), vocab_size=97).model


@pytest.mark.parametrize("preset", ["paper", "tiny"])
@pytest.mark.parametrize("name", LOOPED)
def test_every_file_and_preset_resolves(name, preset):
    config = resolved(name, preset)
    assert Settings.from_dict(FILES[name].get_config(preset)) == settings_of(name, preset)
    assert resolve(Settings.from_dict(config.to_dict())) == config
    assert micro_batches(config, devices=8 if preset == "paper" else 1) >= 1
    LoopSampler(config)  # loops can be drawn so
    assert config.model.loops in config.train.eval_loops
    loops = f"K{config.model.loops}_L{config.model.layers}_{config.model.loss}"
    assert run_name(settings_of(name, preset)).startswith(f"{name}_{loops}_D{config.model.width}")


@pytest.mark.parametrize("name", LOOPED)
def test_its_papers_size(name):
    ours, theirs = SIZES[name]
    assert parameter_counts.count(resolved(name, "paper").model, "all") == ours
    assert theirs is None or abs(ours / theirs - 1) < 0.12
    assert f"{ours / 1e9:.2f} B" in page() or f"{ours / 1e6:.1f} M" in page()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in LOOPED]
)
def test_it_trains(home, tmp_path, name):
    bare = [f"--config.train.{key}" for key in ("sample_tokens=0", "eval_first=False")]
    done = run_here(home, tmp_path / name, *bare, steps=10, config=f"{name}:tiny")
    assert done[0] == 0, done[2]
    by_step = losses(tmp_path / name)
    assert len(by_step) == 10 and by_step[10] < by_step[1] - 0.5


@pytest.mark.parametrize("name", LOOPED)
def test_it_decodes_exactly(name):
    config = small(name)
    check_decoding(config, loop_counts=(config.loops + 1,))


@pytest.mark.parametrize("name", LOOPED)
def test_one_pass_gives_all_loop_counts(name):
    config = small(name)
    params = loud(config)
    together = transformer.forward(config, params, TOKENS, loops=6, return_loops=tuple(range(6)))
    for loops in (1, config.loops, 6):
        alone = transformer.forward(config, params, TOKENS, loops=loops).hidden[0]
        np.testing.assert_allclose(together.hidden[loops - 1], alone, atol=1e-5)
    assert np.abs(np.diff(together.hidden, axis=0)).max((1, 2, 3)).min() > 1e-3  # each one matters


def test_names_of_families_and_their_presets():
    assert sources.read("Huginn:tiny") == sources.read("huginn:tiny")
    assert sources.read("huginn") == presets.make("huginn", "paper").to_dict()
    with pytest.raises(ConfigError, match="preset 'hops' of huginn is unknown; choose paper or t"):
        sources.read("huginn:hops")
    with pytest.raises(ConfigError, match="huggin is no run, file, loop rule or .*nearest: huginn"):
        sources.read("huggin:tiny")


def test_a_name_says_what_differs_from_the_family():
    values = presets.make("parcae", "tiny")
    values.model.parts.kv_shift.on, values.model.parts.state_init.on = True, False
    values.train.seed = 3
    found = run_name(Settings.from_dict(values))
    assert found == "parcae_K4_L1_END_D128_kv_shift_no-state_init_seed3"
    assert run_name(settings_of("diagonal", "tiny")) == "diagonal_K4_L2_END_D128"


@pytest.mark.parametrize("name", LOOPED)
def test_the_flags_of_the_page_are_the_preset(name):
    """A reader can build each shape from the command line alone."""
    command = re.search(
        rf"looped-jax train --config (\w+) \\\n((?:.*\\\n)*.*)  # {name}:paper", page()
    )
    assert command, name
    flags = command[2].replace("\\\n", " ").split()
    found = cli.parse("train", ["--config", command[1], *flags]).settings
    wanted, found = settings_of(name, "paper").leaves(), found.leaves()
    assert {k: v for k, v in found.items() if v != wanted[k]} == {}


def page():
    return (ROOT / "docs" / "models.md").read_text("utf-8")
