"""Whole models: each is what its file says, trains, decodes exactly, and has its paper's size."""

import dataclasses
import re

import numpy as np
import pytest

from configs import huginn, middle, nanochat, ouro, parcae, universal
from looped_jax import cli
from looped_jax.config import presets, sources
from looped_jax.config.families import FAMILIES, base_preset
from looped_jax.config.resolved import micro_batches
from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError
from looped_jax.model import parameter_counts, transformer
from looped_jax.resolve import resolve, run_name
from looped_jax.training.loop_sampler import LoopSampler
from looped_jax.training.metric_log import read_log
from tests.model.test_part import TOKENS, check_decoding, loud
from tests.programs import ROOT, losses, run_here

FILES = {
    "huginn": huginn, "parcae": parcae, "ouro": ouro, "universal": universal, "middle": middle,
    "nanochat": nanochat,
}  # fmt: skip
ALL = [(name, preset) for name in FILES for preset in FAMILIES[name]]
# As built here, and in the paper; docs/models.md says where they differ.
SIZES = {
    "huginn": (3_424_227_840, 3.56e9),
    "parcae": (143_721_984, 140e6),
    "ouro": (1_409_386_497, 1.43e9),
    "universal": (79_693_824, None),
    "middle": (40_108_032, 35.9e6),
    "nanochat": (896_535_720, 896.54e6),
}


# To train: between them they have most of what the others have.
QUICK = ("huginn", "universal", "nanochat")


def at_scale(name):
    """The preset of its paper's sizes, the first."""
    return next(iter(FAMILIES[name]))


def tiny(name):
    """Its smallest preset that loops."""
    return "laptop_loops" if name == "nanochat" else "tiny"


def settings_of(name, preset):
    return Settings.from_dict(presets.make(name, preset))


def resolved(name, preset, **model):
    settings = settings_of(name, preset)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **model))
    return resolve(settings, vocab_size=settings.data.tokenizer_vocab_size)


def small(name):
    """The tiny preset, smaller still, for the tokens of other tests."""
    sizes = {"width": 32, "heads": 4, "seq_len": 12, "vocab_size": 97}
    settings = settings_of(name, tiny(name))
    model = dataclasses.replace(settings.model, **sizes)
    return resolve(dataclasses.replace(settings, model=model), vocab_size=97).model


@pytest.mark.parametrize(("name", "preset"), ALL)
def test_every_file_and_preset_resolves(name, preset):
    config = resolved(name, preset)
    assert Settings.from_dict(FILES[name].get_config(preset)) == settings_of(name, preset)
    assert resolve(Settings.from_dict(config.to_dict())) == config
    assert micro_batches(config, devices=1 if base_preset(preset) == "tiny" else 8) >= 1
    LoopSampler(config)  # loops can be drawn so
    assert config.model.loops in config.train.eval_loops
    loops = f"K{config.model.loops}_L{config.model.layers}_{config.model.loss}"
    own = "" if preset in presets.PRESETS else f"-{preset}"
    assert run_name(settings_of(name, preset)).startswith(f"{name}{own}_{loops}")


@pytest.mark.parametrize("name", FILES)
def test_its_papers_size(name):
    ours, theirs = SIZES[name]
    assert parameter_counts.count(resolved(name, at_scale(name)).model, "all") == ours
    assert theirs is None or abs(ours / theirs - 1) < 0.12
    assert f"{ours / 1e9:.2f} B" in page() or f"{ours / 1e6:.1f} M" in page()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in FILES]
)
def test_it_trains(home, tmp_path, name):
    bare = [f"--config.train.{key}" for key in ("sample_tokens=0", "eval_first=False")]
    done = run_here(home, tmp_path / name, *bare, steps=10, config=f"{name}:{tiny(name)}")
    assert done[0] == 0, done[2]
    by_step = losses(tmp_path / name)
    assert len(by_step) == 10 and by_step[10] < by_step[1] - 0.5
    if name == "nanochat":
        z = "scalars/parts.residual_scalars.input"  # of one layer
        logged = [entry[z][0][0] for entry in read_log(tmp_path / name) if z in entry]
        assert len(set(logged)) == 10 and max(abs(np.diff([0.1, *logged]))) < 0.1
        assert "no weight of this model is of that group" not in done[1]


@pytest.mark.parametrize("name", FILES)
def test_it_decodes_exactly(name):
    config = small(name)
    check_decoding(config, loop_counts=(config.loops + 1,))


@pytest.mark.parametrize("name", FILES)
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


@pytest.mark.parametrize("name", [name for name in FILES if name != "nanochat"])
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


@pytest.mark.parametrize(("preset", "blocks"), [("seed", 1), ("head", 2)])
def test_nanochats_flags_of_the_pages_are_its_presets(preset, blocks):
    """Model and optimizer by two pages, and of rows, length and habits the table of one of them."""
    flags = ["--config", "LT"]
    for file, heading in (("from_nanochat", "## Its model"), ("optimizer", "## nanochat's recipe")):
        text = (ROOT / "docs" / f"{file}.md").read_text("utf-8").split(heading)[1]
        found = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)[:blocks]
        flags += re.findall(r"--config\.\S+", "".join(found))
    told, wanted = (
        cli.parse("train", flags).settings.leaves(),
        settings_of("nanochat", preset).leaves(),
    )
    different = {key for key, value in wanted.items() if value != told[key]}
    of_length = {"model.layers", "model.loops", "optim.reference_batch_tokens"}
    assert {k for k in different if k.startswith(("model.", "optim."))} <= of_length


@pytest.mark.parametrize("layers", [4, 12, 26])
def test_a_depth_is_nanochats(layers):
    golden = np.load(ROOT / "tests" / "golden" / "nanochat" / "depth_table_seed.npz")
    wanted = dict(zip(golden["columns"].tolist(), golden["table"][layers - 4], strict=True))
    for config in (resolved("nanochat", f"d{layers}"), resolved("nanochat", f"d{layers}x3")):
        muon = config.optim.optimizers["muon"]
        assert config.model.width == wanted["n_embd"]
        assert config.train.tokens_per_step == wanted["batch_tokens"]
        assert config.train.steps == wanted["iterations"]
        assert muon.weight_decay == pytest.approx(wanted["weight_decay"], rel=1e-9)
    assert sources.read("nanochat:d20") == sources.read("nanochat:seed")
    with pytest.raises(ConfigError, match="a size as d12 or d12x4"):
        sources.read("nanochat:12")


def test_two_presets_have_two_names():
    names = [run_name(settings_of("nanochat", size)) for size in ("d4", "d26", "d6x2", "head")]
    assert names[:2] == ["nanochat-seed_K1_L4_END_winSSSL", "nanochat-seed_K1_L26_END_winSSSL"]
    assert names[2:] == ["nanochat-loops_K2_L6_END_winSSSL", "nanochat-head_K1_L20_END_winSSSL"]


def page():
    return (ROOT / "docs" / "models.md").read_text("utf-8")
