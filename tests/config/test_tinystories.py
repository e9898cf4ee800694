"""The story teller's presets: its model to its own numbers, its sizes, first weights and rates."""

import json
import math
import re

import jax
import numpy as np
import pytest

from configs import tinystories
from looped_jax import files
from looped_jax.config import presets
from looped_jax.config.families import FAMILIES
from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError
from looped_jax.model import flops, parameter_counts, probe, transformer
from looped_jax.resolve import resolve, run_name
from looped_jax.training.optimizers import group_rates
from looped_jax.training.optimizers.base import RunScale
from looped_jax.training.optimizers.schedules import learning_rate_multiplier
from tests.golden_cases import FOLDER
from tests.model.test_gpt2 import check_gradients_of, run
from tests.model.test_transformer import logits_at
from tests.programs import losses, run_here
from torch_ref import gpt2_names

# Its names, and what GPT-2 calls the same.
NAMES = {
    "token_emb": "wte", "pos_emb": "wpe", "blocks.": "h.", "ln1": "ln_1", "ln2": "ln_2",
    "qkv_proj": "c_attn", "out_proj": "c_proj", "ffn.0": "mlp.c_fc", "ffn.2": "mlp.c_proj",
}  # fmt: skip
SIZES = {"seed": 1_848_064, "minutes": 1_069_824, "loop": 1_254_784, "d2x2": 1_452_544}


def settings_of(preset, **model):
    config = presets.make("tinystories", preset)
    config.model.update(model)
    return Settings.from_dict(config)


def of(arrays, kind):
    """Arrays of a kind, by our names."""
    found = {}
    for full, array in arrays.items():
        if full.startswith(kind):
            name = full.removeprefix(kind)
            for theirs, gpt2s in NAMES.items():
                name = name.replace(theirs, gpt2s)
            found[name] = array
    return gpt2_names.from_gpt2(found, transposed=True)


def test_logits_loss_gradients_and_attention_are_its_own():
    with np.load(FOLDER / "tinystories" / "model.npz", allow_pickle=False) as file:
        arrays = dict(file)
    sizes = {"layers": 2, "width": 32, "heads": int(arrays["heads"]), "seq_len": 12}
    config = presets.make("tinystories", "seed")
    config.model.update(sizes)
    config.model.parts.learned_positions.length = 16
    config.model.parts.dropout.on = config.model.parts.attention_dropout.on = False
    model = resolve(Settings.from_dict(config), vocab_size=61).model
    params = of(arrays, "param/")
    assert {n: a.shape for n, a in params.items()} == {
        n: w.shape for n, w in transformer.weights(model).items()
    }
    tokens = arrays["tokens"].astype(np.int32)
    logits = logits_at(model, params, tokens[:, :-1], (1,))[0]
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=2e-5)
    recorder = probe.Recorder(["weights"])
    seen = transformer.forward(model, params, tokens[:, :-1], probe=recorder).seen["weights"]
    np.testing.assert_allclose(seen[0, -1], arrays["attention_last_layer"], rtol=0, atol=2e-5)
    value, grads = run(model, params, tokens[:, :-1], tokens[:, 1:])
    np.testing.assert_allclose(value, arrays["loss"], rtol=0, atol=1e-5)
    check_gradients_of(grads, of(arrays, "grad/"))


@pytest.mark.parametrize("preset", SIZES)
def test_it_has_its_weights(preset):
    config = resolve(settings_of(preset), vocab_size=2_048 if preset == "minutes" else 8_000)
    model = config.model
    assert Settings.from_dict(tinystories.get_config(preset)) == settings_of(preset)
    assert parameter_counts.count(model, "all") == SIZES[preset]
    params = transformer.init_params(model, jax.random.key(0))
    for name in ("embed", "parts.learned_positions.table", "blocks.0.attention.query",
                 "blocks.0.attention.out", "blocks.0.mlp.up", "blocks.0.mlp.down"):  # fmt: skip
        np.testing.assert_allclose(np.std(params[name]), 0.02, rtol=0.03)
    biases = {re.sub(r".*\.(\w+\.\w+)", r"\1", name) for name in params if "bias" in name}
    assert biases == {"norm.bias", "attention_norm.bias", "mlp_norm.bias", "of.up", "of.down"}


def test_loops_cost_what_its_four_layers_cost():
    found = {p: resolve(settings_of(p), vocab_size=8_000) for p in ("seed", "loop", "d2x2", "d4")}
    assert len({flops.count(config.model).flops for config in found.values()}) == 1
    assert found["d4"].model == found["seed"].model
    assert run_name(settings_of("loop")) == "tinystories-loop_K4_L1_END_D128"
    assert [*FAMILIES["tinystories"]] == ["seed", "minutes", "loop"]
    with pytest.raises(ConfigError, match="choose seed, minutes or loop, a size as d4 or d2x2"):
        presets.make("tinystories", "d0")


def test_every_weight_decays_and_the_first_update_has_a_rate():
    """Its own rates by step, but for the first 500, which there are a step behind."""
    config = resolve(settings_of("seed"), vocab_size=8_000)
    multiplier = learning_rate_multiplier(config.optim, config.train.steps)
    run = RunScale(128, 10_000, multiplier, config.train.tokens_per_step)
    assert config.train.tokens_per_step == 65_280
    groups = {weight.group for weight in transformer.weights(config.model).values()}
    assert groups == {"matrix", "table", "vector"}
    for group in groups:
        of = group_rates.of_group(config.optim, group, run, learning_rate=0.5)
        assert (of.weight_decay, of.beta1, of.beta2, of.eps) == (0.1, 0.9, 0.95, 1e-8)
        rates = {0: 6e-7, 249: 1.5e-4, 499: 3e-4, 500: 3e-4, 501: 0.0002999999926183015,
                 1000: 0.0002981587759593675, 5250: 0.000165,
                 9999: 3.000000738169851e-05}  # fmt: skip
        for step, rate in rates.items():
            np.testing.assert_allclose(of.learning_rate(step), rate, rtol=2e-6)


def test_a_run_of_another_length_falls_as_far():
    config = presets.make("tinystories", "minutes")
    config.train.steps = 60
    own = resolve(Settings.from_dict(config), vocab_size=300)
    multiplier = learning_rate_multiplier(own.optim, own.train.steps)
    np.testing.assert_allclose(
        [multiplier(step) for step in (0, 2, 3, 59)], [1 / 3, 1, 1, 0.1], atol=1e-3
    )


@pytest.mark.slow
def test_it_trains_in_loops_on_stories_of_one_file(home, tmp_path):
    """Which is cut in two; with the preset's dropout."""
    story = "Once upon a time a cat met a dog. They ran and ran, and then they slept.\n"
    files.write_text(
        tmp_path / "first_50000.jsonl",
        "".join(json.dumps({"text": f"{i}. {story}"}) + "\n" for i in range(60)),
    )
    given = (
        f"--config.data.path={tmp_path / 'first_50000.jsonl'}", "--config.train.seed=0",
        "--config.data.tokenizer_vocab_size=300", "--config.data.tokenizer=train",
        "--config.train.eval_first=False", "--config.train.eval_tokens=64",
        "--config.train.eval_loops=1", "--config.train.sample_tokens=0", "--config.model.heads=2",
    )  # fmt: skip
    code, out, err = run_here(home, tmp_path / "run", *given, steps=10, config="tinystories:d1x2")
    assert code == 0, err
    assert "best            bpb" in out
    found = losses(tmp_path / "run")
    assert found[1] == pytest.approx(math.log(300), abs=0.15) and found[10] < found[1]
