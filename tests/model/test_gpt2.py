"""GPT-2 as parts and settings, against its own numbers and nanoGPT's. See golden/README.md."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.options import WeightGroups
from looped_jax.config.registry import LOOP_RULES, PARTS, WEIGHT_GROUPS
from looped_jax.config.settings import ModelSettings, OptimConfig, Settings, TrainSettings
from looped_jax.config.transformer_settings import MLPSettings, NormSettings, RopeSettings
from looped_jax.errors import ArgumentError, ConfigError
from looped_jax.inference.decoding import generate_tokens
from looped_jax.model import attention_kernels, flops, transformer
from looped_jax.model.norm import Norm
from looped_jax.model.parts import dropout
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.runtime.hardware import AttentionSupport
from looped_jax.training import optimizers, train_step
from looped_jax.training.optimizers.schedules import learning_rate_multiplier
from tests.golden_cases import FOLDER
from tests.model.test_nanochat import relative
from tests.model.test_part import TOKENS, check_decoding, check_gradients, loud, with_parts
from tests.model.test_transformer import logits_at, objective
from torch_ref import gpt2_names

SIZES = {"layers": 2, "loops": 2, "width": 32, "heads": 4, "kv_heads": 2, "seq_len": 12}
GPT2 = {  # everything at once, but for the parts
    "norm": NormSettings("layer", gain=True, bias=True, eps=1e-5, embedding=False),
    "mlp": MLPSettings("gelu_tanh"),
    "rope": RopeSettings(on=False),
    "embedding": "tied",
    "soft_cap": 0.0,
}
OWN_PARTS = ("attention_dropout", "biases", "dropout", "learned_positions")


def nanogpt(bias):
    """Arrays of a nanoGPT case, its settings, our model and our parameters."""
    with np.load(FOLDER / "gpt2" / f"nanogpt_{bias}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    theirs = json.loads(str(arrays["settings"]))
    described = gpt2_names.Description(
        layers=theirs["n_layer"], heads=theirs["n_head"], width=theirs["n_embd"],
        positions=theirs["block_size"], vocab_size=theirs["vocab_size"], activation="gelu",
        bias=theirs["bias"],
    )  # fmt: skip
    return arrays, theirs, gpt2_names.model_settings(described), of(arrays, "param0/")


def of(arrays, kind):
    found = {n.removeprefix(kind): a for n, a in arrays.items() if n.startswith(kind)}
    return gpt2_names.from_gpt2(found, transposed=True)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, targets):
    grad = jax.value_and_grad(lambda p: objective(config, p, tokens, targets)[0])
    return grad(params)


def check_gradients_of(found, golden, width=None):
    for name, array in golden.items():
        if name.endswith("biases.of.key"):  # of which softmax leaves nothing but rounding
            assert np.abs(found[name]).max() < 1e-6
        else:
            assert relative(found[name], array) < 1e-4, name


@pytest.mark.parametrize("bias", ["bias", "nobias"])
def test_nanogpts_logits_losses_and_gradients(bias):
    arrays, _, settings, params = nanogpt(bias)
    config = resolve(Settings(model=settings)).model
    assert {n: a.shape for n, a in params.items()} == {
        n: w.shape for n, w in transformer.weights(config).items()
    }
    inputs, targets = arrays["tokens"][0, :, :-1], arrays["tokens"][0, :, 1:]
    logits = logits_at(config, params, inputs.astype(np.int32), (1,))[0]
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=2e-5)
    value, grads = run(config, params, inputs.astype(np.int32), targets.astype(np.int32))
    np.testing.assert_allclose(value, arrays["loss"], rtol=0, atol=1e-5)
    check_gradients_of(grads, of(arrays, "grad/"))


@pytest.mark.parametrize("bias", ["bias", "nobias"])
def test_ten_updates_of_nanogpt(bias):
    """Decay of what has two dimensions alone, a cosine to a floor, clipping, micro-batches."""
    arrays, theirs, settings, params = nanogpt(bias)
    alike = {name: WEIGHT_GROUPS[name].Settings(width_scaling=False) for name in WEIGHT_GROUPS}
    alike["vector"] = dataclasses.replace(alike["vector"], weight_decay=0.0)
    peak, warmup = theirs["learning_rate"], theirs["warmup_iters"] + 1
    beta1, beta2 = theirs["betas"]
    optim = OptimConfig(
        optimizer="adamw", embedding_learning_rate=peak, vector_learning_rate=peak, beta1=beta1,
        beta2=beta2, eps=theirs["eps"], weight_decay=theirs["weight_decay"],
        grad_clip_norm=theirs["grad_clip"], warmup_steps=warmup,
        warmdown_steps=theirs["lr_decay_iters"] - theirs["warmup_iters"], warmdown_shape="cosine",
        final_lr_fraction=theirs["min_lr"] / peak,
        groups=WeightGroups(
            {n: dataclasses.replace(own, learning_rate=peak) for n, own in alike.items()}
        ),
    )  # fmt: skip
    length, batch = settings.seq_len, theirs["batch"] * theirs["grad_accum"]
    config = resolve(
        Settings(
            model=settings, optim=optim,
            train=TrainSettings(
                steps=10, tokens_per_step=batch * length, batch_size=theirs["batch"]
            ),
        )
    )  # fmt: skip
    multiplier = learning_rate_multiplier(optim, theirs["lr_decay_iters"])
    np.testing.assert_allclose(
        [peak * multiplier(step) for step in range(10)], arrays["lrs"], rtol=1e-6
    )
    mesh = sharding.one_device()
    optimizer = optimizers.make_optimizer(config, mesh, steps=theirs["lr_decay_iters"])
    state = train_step.create(config, optimizer, mesh)
    state = dataclasses.replace(state, params=jax.tree.map(jnp.asarray, params))
    step = train_step.make_train_step(config, optimizer, mesh)
    tokens = arrays["tokens"].astype(np.int32)
    for number, rows in enumerate(tokens.reshape(10, theirs["grad_accum"], -1, length + 1)):
        state, metrics = step(state, rows)
        np.testing.assert_allclose(
            metrics["grad_norm"], arrays["grad_norms_before_clip"][number], rtol=1e-4
        )
    for name, array in of(arrays, "param/").items():
        if name.endswith("biases.of.key"):
            continue  # rounding noise, which Adam blows up
        clear = np.abs(of(arrays, "grad/")[name]) > 1e-6  # of the others one has 1e-7, noise too
        assert clear.mean() > 0.99 or name in ("embed", "parts.learned_positions.table")
        found = np.where(clear, state.params[name], array)
        np.testing.assert_allclose(found, array, rtol=0, atol=1e-6, err_msg=name)


def test_the_rates_of_nanogpts_presets():
    """(warm-up, decay, rates by step) of its GPT-2 and of its characters."""
    for peak, warmup, end, rates in (
        (6e-4, 2000, 600_000, {0: 2.998500749625187e-07, 1999: 0.0005997001499250374,
                               10_000: 0.0005997615775246896, 300_000: 0.0003314184383189326}),
        (1e-3, 100, 5000, {0: 9.900990099009901e-06, 101: 0.000999999907510999, 2550: 0.00055,
                           4999: 0.00010000009248900101, 5001: 1e-4}),
    ):  # fmt: skip
        own = OptimConfig(
            warmup_steps=warmup + 1, warmdown_steps=end - warmup, warmdown_shape="cosine",
            final_lr_fraction=0.1,
        )  # fmt: skip
        rest = dataclasses.replace(own, warmdown_steps=None, warmdown_rest=True)
        for multiplier in (learning_rate_multiplier(each, end) for each in (own, rest)):
            for step, rate in rates.items():
                np.testing.assert_allclose(peak * multiplier(step), rate, rtol=2e-6)
    flat = OptimConfig(warmdown_rest=True)  # no warm-up: the first step has the whole rate
    assert list(map(learning_rate_multiplier(flat, 4), range(5))) == [1, 0.75, 0.5, 0.25, 0]
    for given in ({"warmdown_steps": 3}, {"warmdown_ratio": 0.5}):
        with pytest.raises(
            ConfigError, match=r"warmdown_rest=True and optim.warmdown_\w+=\S+ both"
        ):
            Settings.from_dict({"optim": given | {"warmdown_rest": True}})
    with pytest.raises(ConfigError, match="warmdown_ratio=0.5 and optim.warmdown_steps=3 both"):
        Settings.from_dict({"optim": {"warmdown_ratio": 0.5, "warmdown_steps": 3}})
    with pytest.raises(ConfigError, match="warmdown_steps=9 is longer than the run, of 8 steps"):
        resolve(
            Settings.from_dict({"optim": {"warmdown_steps": 9}, "train": {"steps": 8}}),
            vocab_size=97,
        )
    with pytest.raises(ConfigError, match="dropout.branch=1.0 is out of range"):
        Settings.from_dict({"model": {"parts": {"dropout": {"branch": 1.0}}}})


def small(parts=OWN_PARTS, **settings):
    config = with_parts(parts, **SIZES | GPT2 | settings)
    assert set(config.model.parts.on()) == set(parts)
    return config


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[pytest.mark.slow] * (v != "LT_i")) for v in LOOP_RULES],
)
def test_with_all_of_it_decoding_is_exact_and_the_first_loop_is_of_no_rule(variant):
    config = small(variant=variant).model
    check_decoding(config, loop_counts=(1, 2) if variant == "gate" else (1, 3))
    plain = small(variant="LT").model
    params = loud(config)
    own = {name: params[name] for name in transformer.weights(plain)}
    np.testing.assert_allclose(
        transformer.forward(config, params, TOKENS, loops=1).hidden,
        transformer.forward(plain, own, TOKENS, loops=1).hidden,
        atol=1e-6,
    )


@pytest.mark.slow
def test_with_all_of_it_meshes_change_nothing_and_gradients_reach_every_weight():
    check_gradients(small())


def test_norms_are_what_they_say():
    x = np.random.default_rng(0).normal(1, 2, (3, 32)).astype(np.float32)
    for own in (
        NormSettings("layer", eps=1e-5),
        NormSettings("layer", gain=True, eps=1e-5),
        NormSettings("layer", gain=True, bias=True),
        NormSettings(gain=True),
    ):
        norm = Norm(with_parts((), norm=own).model)
        gain, bias = np.float32(1), np.float32(0)
        if norm.gain is not None:
            gain = np.linspace(0.5, 2, 32, dtype=np.float32)
            norm.gain.set_value(jnp.asarray(gain))
        if norm.bias is not None:
            bias = np.linspace(-1, 1, 32, dtype=np.float32)
            norm.bias.set_value(jnp.asarray(bias))
        centred = x - x.mean(-1, keepdims=True) if own.kind == "layer" else x
        eps = 1.1920929e-7 if own.eps is None else own.eps
        expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * gain + bias
        np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-5)


def test_they_cost_what_they_hold():
    plain = with_parts((), **SIZES).model
    config = with_parts(("biases", "learned_positions"), **SIZES, norm=GPT2["norm"]).model
    more = flops.count(config).parameters - flops.count(plain).parameters
    assert more == 5 * 2 * 32 + 12 * 32 + 2 * (32 + 2 * 16 + 32 + 4 * 32 + 32)
    assert flops.count(config).flops == flops.count(plain).flops


def seeded(config, seeds, params=None, rows=TOKENS):
    params = loud(config) if params is None else params
    return np.asarray(
        transformer.forward(config, params, rows, seeds=np.array(seeds, np.uint32)).hidden[0]
    )


def test_dropout_drops_by_row_alone_and_not_in_evaluation():
    config = small(("attention_dropout", "dropout")).model
    plain = small(()).model
    whole = transformer.forward(plain, loud(plain), TOKENS).hidden[0]
    np.testing.assert_array_equal(
        transformer.forward(config, loud(config), TOKENS).hidden[0], whole
    )
    first, second = seeded(config, [3, 4]), seeded(config, [4, 3], rows=TOKENS[::-1])
    np.testing.assert_allclose(first, second[::-1], atol=1e-6)  # whatever row stands beside it
    assert np.abs(first - seeded(config, [5, 4]))[0].max() > 0.1


@pytest.mark.parametrize(
    ("part", "own"),
    [
        ("attention_dropout", {"rate": 0.25}),
        ("dropout", {"embedding": 0.25, "branch": 0.0}),
        ("dropout", {"embedding": 0.0, "branch": 0.25}),
    ],
)
def test_dropout_keeps_the_mean(part, own):
    """Of what is drawn, and roughly of the states that follow from it."""
    config = small((part,), layers=1, loops=1).model
    settings = dataclasses.replace(config.parts[part], **own)
    config = dataclasses.replace(config, parts=type(config.parts)({part: settings}))

    here = dataclasses.make_dataclass("Here", ["draw"])(
        lambda sampler, *of: sampler(jax.random.key(0), of[0], (4, 1000, *of[1]))
    )
    kept = np.asarray(dropout._kept(0.25, (5,), here))
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1 / 0.75)}
    np.testing.assert_allclose(kept.mean(), 1, atol=0.03)
    params = loud(config, 0.1)
    rows = np.repeat(TOKENS[:1], 256, axis=0)
    found = seeded(config, range(256), params, rows)
    assert found.std(0).max() > 0.01  # it acts
    whole = np.asarray(transformer.forward(config, params, TOKENS[:1]).hidden[0, 0])
    assert relative(found.mean(0), whole) < 0.1


def test_dropout_of_attention_turns_fused_kernels_off_and_says_so():
    config = dataclasses.replace(small(("attention_dropout",)).model, dtype="bfloat16")
    gpu = AttentionSupport("gpu", "cudnn", None)
    assert attention_kernels.choose(config, gpu, time=12).kernel == "cudnn"  # none in evaluation
    told = str(attention_kernels.check(config, gpu))
    assert told.startswith("attention: xla, since model.parts.attention_dropout changes attention")
    named = dataclasses.replace(config, kernel="cudnn")
    with pytest.raises(ConfigError, match="model.kernel=cudnn: model.parts.attention_dropout"):
        attention_kernels.check(named, gpu)


def test_rows_longer_than_the_learned_positions_are_refused():
    config = small(("learned_positions",)).model
    with pytest.raises(ArgumentError, match="a row of 13 tokens is longer than the 12 positions"):
        next(generate_tokens(config, loud(config), [[1] * 10], tokens=4))
    assert next(generate_tokens(config, loud(config), [[1] * 10], tokens=3)).shape == (1,)
    longer = dataclasses.replace(PARTS["learned_positions"].Settings(on=True), length=40)
    parts = type(config.parts)({"learned_positions": longer})
    assert dataclasses.replace(config, parts=parts).longest_row() == 40
    shorter = type(config.parts)({"learned_positions": dataclasses.replace(longer, length=8)})
    with pytest.raises(ConfigError, match="length=8 is shorter than rows of model.seq_len=12"):
        transformer.weights(dataclasses.replace(config, parts=shorter))


def test_what_takes_a_norm_for_a_scale_is_refused_beside_another_norm():
    for part in ("backout", "carried_scale"):
        with pytest.raises(ConfigError, match=f"model.parts.{part} finds the stream x again"):
            transformer.weights(with_parts((part,), **SIZES, norm=GPT2["norm"]).model)


def test_unknown_choices_are_named():
    with pytest.raises(ConfigError, match="model.mlp.activation='silu' is unknown; choose relu2"):
        Settings.from_dict({"model": {"mlp": {"activation": "silu"}}})
    with pytest.raises(ConfigError, match="model.norm.kind='batch' is unknown; choose rms or lay"):
        Settings.from_dict({"model": {"norm": {"kind": "batch"}}})
    assert ModelSettings().norm == NormSettings() and NormSettings().keeps_direction


def gpt2(**changes):
    """Arrays of the real GPT-2's case, its model in `changes`, and our parameters."""
    safetensors = pytest.importorskip("safetensors.numpy")
    with np.load(FOLDER / "gpt2" / "gpt2.npz", allow_pickle=False) as file:
        arrays = dict(file)
    described = gpt2_names.Description(layers=2, heads=4, width=48, positions=32, vocab_size=97)
    config = resolve(Settings(model=gpt2_names.model_settings(described))).model
    theirs = safetensors.load_file(FOLDER / "gpt2" / "model.safetensors")
    return arrays, dataclasses.replace(config, **changes), gpt2_names.from_gpt2(theirs)


def test_the_real_gpt2s_logits_gradients_and_text():
    arrays, config, params = gpt2()
    logits = logits_at(config, params, arrays["tokens"], (1,))[0]
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=2e-5)
    tokens = arrays["tokens"]
    value, grads = run(config, params, tokens[:, :-1], tokens[:, 1:])
    np.testing.assert_allclose(value, arrays["loss"], rtol=0, atol=1e-5)
    grads_there = {n.removeprefix("grad/"): g for n, g in arrays.items() if n.startswith("grad/")}
    check_gradients_of(grads, gpt2_names.from_gpt2(grads_there))
    text = arrays["greedy"].tolist()
    found = [int(new[0]) for new in generate_tokens(config, params, [text[:5]], tokens=27)]
    assert found == text[5:]


def test_nanogpts_gelu_on_the_same_weights():
    arrays, config, params = gpt2(mlp=MLPSettings("gelu"))
    logits = logits_at(config, params, arrays["tokens"], (1,))[0]
    np.testing.assert_allclose(logits, arrays["logits_nanogpt"], rtol=0, atol=2e-5)
    assert np.abs(logits - arrays["logits"]).max() > 1e-3


def test_in_one_loop_of_two_it_is_what_it_was():
    arrays, config, params = gpt2(loops=2)
    first, second = logits_at(config, params, arrays["tokens"], (1, 2))
    np.testing.assert_allclose(first, arrays["logits"], rtol=0, atol=2e-5)
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize(
    ("layers", "heads", "width", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        pytest.param(36, 20, 1280, 774_030_080, marks=pytest.mark.slow),
        pytest.param(48, 25, 1600, 1_557_611_200, marks=pytest.mark.slow),
    ],
)
def test_gpt2s_sizes(layers, heads, width, parameters):
    described = gpt2_names.Description(layers, heads, width, 1024, 50_257)
    config = resolve(Settings(model=gpt2_names.model_settings(described))).model
    filled = (config.padded_vocab - 50_257) * width
    assert sum(w.size for w in transformer.weights(config).values()) == parameters + filled
