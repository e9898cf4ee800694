"""Every configuration file resolves; every bad setting is named with its mend."""

import ml_collections
import pytest

from configs import base, flt, flt_res, hops, lt, lt_i, lt_ia
from looped_jax.config import presets
from looped_jax.config.registry import LOOP_RULES, TASKS
from looped_jax.config.resolved import micro_batches
from looped_jax.config.settings import (
    MeshConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
    default_config,
)
from looped_jax.errors import ConfigError
from looped_jax.resolve import resolve, run_name


@pytest.mark.parametrize("preset", [None, "paper", "tiny", "1b", "3b", "24gb"])
@pytest.mark.parametrize("file", [flt, flt_res, lt_ia, lt_i, lt])
def test_every_file_and_preset_resolves(file, preset):
    config = resolve(Settings.from_dict(file.get_config(preset)), vocab_size=4096)
    assert config.model.variant.lower() == file.__name__.split(".")[-1]
    assert micro_batches(config, devices=1) >= 1
    assert resolve(Settings.from_dict(config.to_dict())) == config


@pytest.mark.parametrize("preset", ["chain_end", "chain_ends_16", "hops", "steps"])
def test_presets_of_tasks_fit_their_rows_under_any_rule(preset):
    for rule in LOOP_RULES:
        settings = Settings.from_dict(presets.make(rule, preset))
        task = TASKS[settings.data.task](settings)
        config = resolve(settings, vocab_size=task.vocab_size)
        assert micro_batches(config, devices=1) == 1 and task.length == config.model.seq_len
        assert run_name(settings) == f"{preset}_{rule}_K4_L1_{settings.model.loss}_D64"
    assert Settings.from_dict(hops.get_config(preset)).data.task == config.data.task


def test_no_preset_is_paper_scale():
    config = resolve(Settings.from_dict(flt.get_config()), vocab_size=151_670)
    m = config.model
    assert (m.layers, m.loops, m.seq_len, m.width, m.heads) == (6, 12, 1024, 384, 3)
    assert config.train.tokens_per_step == 524_288 and m.padded_vocab == 151_680


def test_a_preset_with_a_tokenizer_can_ask_for_one_trained_on_the_text():
    config = flt.get_config()
    assert Settings.from_dict(config).data.tokenizer == "data/qwen3/tokenizer.json"
    config.data.tokenizer = "train"  # as a command line says None
    assert Settings.from_dict(config).data.tokenizer is None
    assert Settings.from_dict(config).data.bos_token is None  # whichever the tokenizer has


def test_sizes_follow_from_depth_unless_given():
    deep = resolve(Settings(model=ModelSettings(layers=3)), vocab_size=97).model
    assert (deep.width, deep.heads, deep.kv_heads, deep.head_dim) == (192, 2, 2, 96)
    given = resolve(Settings(model=ModelSettings(layers=3, width=64, heads=4)), vocab_size=97).model
    assert (given.width, given.heads, given.kv_heads, given.head_dim) == (64, 4, 4, 16)


def test_length_follows_from_the_parameters_unless_given():
    sizes = ModelSettings(layers=1, width=64, heads=1)
    config = resolve(
        Settings(model=sizes, train=TrainSettings(tokens_per_step=1000)), vocab_size=128
    )
    parameters = 2 * 128 * 64 + 12 * 64 * 64
    assert config.train.steps == 20 * parameters // 1000
    longer = Settings(model=sizes, train=TrainSettings(steps=7))
    assert resolve(longer, vocab_size=128).train.steps == 7


def test_heads_by_default_are_the_fewest_that_cut_the_width():
    model = resolve(Settings(model=ModelSettings(layers=5)), vocab_size=97).model
    assert (model.width, model.heads) == (320, 4)  # three of at most 128 would not divide it


def test_names_of_earlier_versions_are_read():
    settings = Settings.from_dict({"train": {"inside_every": 5}, "data": {"follow_hosts": True}})
    assert settings.train.diagnostics_every == 5 and settings.data.allow_host_change


def test_what_changes_a_result_changes_the_name():
    wider = Settings(model=ModelSettings(vocab_size=8192))
    assert run_name(wider) != run_name(Settings())


def test_windows_and_scored_loops():
    def model(**settings):
        return resolve(Settings(model=ModelSettings(**settings)), vocab_size=97).model

    short = model(layers=5, window_pattern="SSL", seq_len=32)
    assert short.windows() == (8, 8, None, 8, None)
    assert model(layers=1, window_pattern="S").windows() == (None,)
    assert model(loops=12, loss="FEW").scored_loops() == (8, 9, 10, 11)
    assert model(loops=3, loss="STEP").scored_loops() == (0, 1, 2)
    assert model(loops=3).scored_loops() == (2,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"layrs": 3}}, "model.layrs is no setting; nearest: model.layers"),
        ({"modle": {}}, "modle is no setting; nearest: model"),
        ({"model": {"layers": "six"}}, "model.layers='six' is not of type int"),
        ({"model": {"layers": True}}, "model.layers=True is not of type int"),
        ({"model": {"loops": 0}}, "model.loops=0 is out of range; give 1 or more"),
        ({"model": {"variant": "flt"}}, "model.variant='flt' is unknown; choose FLT, FLT_res"),
        ({"model": {"loss": "ALL"}}, "model.loss='ALL' is unknown; choose END, FEW, STEP"),
        ({"model": {"window_pattern": "SX"}}, "model.window_pattern='SX' must be made of L"),
        ({"model": {"window_pattern": ""}}, "model.window_pattern='' must be made of L"),
        ({"optim": {"beta1": 1.5}}, "optim.beta1=1.5 is out of range; give 0.0 to 1.0"),
        ({"optim": {"warmup_ratio": 0.9}}, "overlap; let them sum to at most 1"),
        ({"train": {"eval_loops": (0,)}}, "train.eval_loops=(0,) must be whole numbers from 1"),
        ({"mesh": {"fsdp": 0}}, "mesh.fsdp=0 is no size"),
        ({"mesh": {"fsdp": -1}}, "leaves more than one axis open"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ConfigError) as error:
        Settings.from_dict(values)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"heads": 5}, "model.heads=5 does not cut model.width=384"),
        ({"width": 9, "heads": 3}, "model.width=9 is odd, so no head has an even width; choose 10"),
        ({"heads": 6, "kv_heads": 4}, "does not divide model.heads=6; choose 1, 2, 3 or 6"),
        ({"vocab_size": 10}, "model.vocab_size=10 is smaller than the tokenizer's 97"),
    ],
)  # fmt: skip
def test_impossible_combinations(model, message):
    with pytest.raises(ConfigError) as error:
        resolve(Settings(model=ModelSettings(**model)), vocab_size=97)
    assert message in str(error.value)


def test_batch_that_is_no_whole_number_of_micro_batches():
    uneven = Settings(train=TrainSettings(tokens_per_step=100_000))
    config, even = (resolve(settings, vocab_size=97) for settings in (uneven, Settings()))
    with pytest.raises(ConfigError, match="choose 98304 or 106496, or another train.batch_size"):
        micro_batches(config, devices=1)
    assert micro_batches(even, devices=4) == 16


def test_mesh_that_does_not_fill_the_devices():
    from looped_jax.runtime import sharding

    with pytest.raises(ConfigError, match="does not fill 8 devices"):
        sharding.make_mesh(MeshConfig(data=3))
    assert dict(sharding.make_mesh(MeshConfig(fsdp=2)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}


def test_unknown_preset():
    with pytest.raises(ConfigError, match="preset 'huge' is unknown; choose paper, tiny, "):
        base.make("FLT", "huge")


def test_defaults_carry_their_types():
    config = default_config()
    assert isinstance(config, ml_collections.ConfigDict)
    assert Settings.from_dict(config) == Settings()
    with pytest.raises(TypeError):
        config.model.heads = "two"  # None by default, yet an int
    assert OptimConfig().eps == 1e-10
