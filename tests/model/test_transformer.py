"""The model against the reference's numbers, and against facts that hold exactly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.registry import LOOP_RULES
from looped_jax.config.resolved import ModelConfig
from looped_jax.config.settings import ModelSettings, Settings
from looped_jax.model import block, loss, norm, transformer
from looped_jax.model.block import rope_tables, rotate
from looped_jax.model.norm import rms_norm
from looped_jax.resolve import resolve
from tests import golden_cases
from tests.covering import DISTINCT_RULES, grid


def objective(config, params, tokens, targets):
    states = transformer.forward(config, params, tokens, return_loops=config.scored_loops())
    nats = loss.token_losses(config, params, states.hidden, targets)
    per_loop = nats.sum((1, 2)) / (targets >= 0).sum()
    return per_loop.mean(), (per_loop, nats, states.norms)


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits_at(config, params, tokens, loop_counts):
    wanted = tuple(k - 1 for k in loop_counts)
    states = transformer.forward(
        config, params, tokens, loops=max(loop_counts), return_loops=wanted
    )
    return loss.logits(config, params, states.hidden)


@pytest.mark.parametrize("name", golden_cases.FORWARD)
def test_golden_losses_and_gradients(name):
    case = golden_cases.load(name)
    check_losses_and_gradients(case, case.model)


@pytest.mark.parametrize("remat", ["none", "dots", "offload"])
def test_what_backward_recomputes_does_not_change_gradients(remat):
    case = golden_cases.load("FLT_K3_STEP")
    check_losses_and_gradients(case, dataclasses.replace(case.model, remat=remat))


def check_losses_and_gradients(case, config):
    tokens, targets = case.arrays["tokens"], case.arrays["targets"]
    run = jax.jit(jax.value_and_grad(functools.partial(objective, config), has_aux=True))
    (value, (per_loop, nats, norms)), grads = run(case.weights("param"), tokens, targets)
    np.testing.assert_allclose(value, case.arrays["loss"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(per_loop, case.arrays["losses"], rtol=0, atol=2e-5)
    expected = np.where(targets < 0, 0, case.arrays["loss_per_token"])
    np.testing.assert_allclose(nats[-1], expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(norms, case.arrays["hidden_norms"], rtol=0, atol=2e-5)
    for tensor, golden in case.weights("grad").items():
        error = np.linalg.norm(grads[tensor] - golden) / np.linalg.norm(golden)
        assert error < 1e-4, (tensor, error)


@pytest.mark.parametrize("name", golden_cases.FORWARD)
def test_golden_logits_of_four_loop_counts_from_one_pass(name):
    case = golden_cases.load(name)
    counts = tuple(sorted({1, 2, 3, 5, case.model.loops}))
    logits = logits_at(case.model, case.weights("param"), case.arrays["tokens"], counts)
    found = dict(zip(counts, logits, strict=True))
    for k in (1, 2, 3, 5):
        np.testing.assert_allclose(found[k], case.arrays[f"logits_K{k}"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(found[case.model.loops], case.arrays["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
def test_losses_do_not_depend_on_the_chunk_of_logits_alive(chunk):
    case = golden_cases.load("FLT_K6_FEW")
    config = dataclasses.replace(case.model, loss_chunk=chunk)
    run = jax.jit(jax.value_and_grad(functools.partial(objective, config), has_aux=True))
    (value, _), grads = run(case.weights("param"), case.arrays["tokens"], case.arrays["targets"])
    np.testing.assert_allclose(value, case.arrays["loss"], rtol=0, atol=2e-5)
    golden = case.weights("grad")["head"]
    assert np.linalg.norm(grads["head"] - golden) < 1e-4 * np.linalg.norm(golden)


def test_no_full_logits_alive_when_the_vocabulary_is_large():
    config = ModelConfig(
        layers=1, loops=6, width=16, heads=1, kv_heads=1, vocab_size=40_000, loss="STEP",
        dtype="float32", loss_chunk=32,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    grad = jax.jit(jax.grad(functools.partial(objective, config), has_aux=True))
    memory = grad.lower(shapes, tokens, tokens).compile().memory_analysis()
    logits_of_one_loop = 4 * 256 * 40_000 * 4
    assert memory.temp_size_in_bytes < logits_of_one_loop / 2


def small(variant, **settings):
    settings = {"layers": 3, "loops": 3, "width": 48, "heads": 2, "seq_len": 32} | settings
    config = ModelSettings(variant=variant, dtype="float32", **settings)
    return resolve(Settings(model=config), vocab_size=97).model


def random_weights(config, seed=0):
    """Every matrix random and non-zero: fresh zeros would hide mistakes."""
    params = transformer.init_params(config, jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    return {
        name: 0.3 * jax.random.normal(key, weight.shape)
        for key, (name, weight) in zip(keys, sorted(params.items()), strict=True)
    }


TOKENS = np.random.default_rng(0).integers(0, 97, (2, 20)).astype(np.int32)
TARGETS = np.random.default_rng(1).integers(0, 97, (2, 20)).astype(np.int32)


def test_one_loop_makes_all_rules_the_same():
    found = [
        logits_at(config, random_weights(config), TOKENS, (1,))
        for config in (small(variant) for variant in LOOP_RULES)
    ]
    for other in found[1:]:  # the programs differ, and so the rounding
        np.testing.assert_allclose(found[0], other, rtol=0, atol=1e-5)


# Blocks that add nothing leave the embedding as it is; only gate goes on to multiply by it.
@pytest.mark.parametrize("variant", [rule for rule in LOOP_RULES if rule != "gate"])
def test_fresh_logits_do_not_depend_on_the_number_of_loops(variant):
    config = small(variant)
    params = transformer.init_params(config, jax.random.key(0))
    found = logits_at(config, params, TOKENS, (1, 3, 6, 12))
    assert np.abs(found).max() > 1e-3
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=0, atol=1e-8)


@functools.cache
def block_gradient_norms(variant, loops, layers):
    """Norm of each block's gradient at fresh weights and embeddings of rms exactly 1."""
    config = small(variant, loops=loops, layers=layers)
    params = transformer.init_params(config, jax.random.key(0))
    params["embed"] = rms_norm(params["embed"])
    grads = jax.jit(jax.grad(lambda p: objective(config, p, TOKENS, TARGETS)[0]))(params)
    return np.array(
        [
            sum(np.sum(g**2) for n, g in grads.items() if n.startswith(f"blocks.{layer}.")) ** 0.5
            for layer in range(layers)
        ]
    )


def residual_injection_ratio(loops, layers=3):
    """FLT_res: each of the later loops' layers averages stream and state, x ← (x + h) / 2."""
    passes_on = 1 - 0.5**layers  # how much of a loop's state reaches the end of the next loop
    last_to_first = 0.5 ** np.arange(layers)[::-1]
    return passes_on ** (loops - 1) + last_to_first * sum(passes_on**j for j in range(loops - 1))


@pytest.mark.parametrize("loops", [3, 6])
@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("LT", lambda k: k),  # K aligned copies
        ("LT_i", lambda k: 2 - 2 ** (1 - k)),
        ("LT_ia", lambda k: 1),  # earlier loops reach the loss through queries only
        ("FLT", lambda k: 1),
        ("FLT_res", lambda k: residual_injection_ratio(k, layers=2)),
    ],
)
def test_gradient_of_fresh_blocks_relative_to_one_loop(variant, expected, loops):
    ratio = block_gradient_norms(variant, loops, 2) / block_gradient_norms(variant, 1, 2)
    np.testing.assert_allclose(ratio, np.broadcast_to(expected(loops), 2), rtol=1e-4)


def test_residual_injection_agrees_with_the_measured_reference():
    for loops, measured in ((3, 1.949), (6, 3.040), (12, 4.279)):
        ratio = np.sqrt(np.mean(residual_injection_ratio(loops) ** 2))
        assert ratio == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("variant", LOOP_RULES)
def test_first_position_sees_loops_only_where_content_is_injected(variant):
    config = small(variant)
    found = logits_at(config, random_weights(config), TOKENS, (1, 2, 5))
    change = np.abs(found[1:, :, 0] - found[0, :, 0]).max()
    if variant in ("FLT", "LT_ia"):  # one key: where the query looks makes no difference
        assert change == 0.0
    else:
        assert change > 1e-3
    assert np.abs(found[1:, :, 1:] - found[0, :, 1:]).max() > 1e-3


@grid(variant=DISTINCT_RULES, attention=("full", "grouped", "mla"), pattern=("L", "SSL"))
def test_causal_and_windowed_for_every_rule_and_attention(variant, attention, pattern):
    config = small(
        variant,
        heads=4,
        kv_heads=2 if attention == "grouped" else None,
        attention="mla" if attention == "mla" else "full",
        latent_rank=16,
        window_pattern=pattern,
        seq_len=8,
    )
    params = random_weights(config)
    before = logits_at(config, params, TOKENS, (3,))[0]
    assert np.isfinite(before).all()
    changed = TOKENS.copy()
    changed[:, 15] = (changed[:, 15] + 1) % 97
    after = logits_at(config, params, changed, (3,))[0]
    np.testing.assert_array_equal(before[:, :15], after[:, :15])
    assert (np.abs(before - after).max(axis=(0, 2))[15:] > 0).all()


@pytest.mark.parametrize("attention", ["full", "mla"])
def test_short_windows_hide_what_lies_before(attention):
    config = small("LT", layers=2, window_pattern="S", seq_len=8, attention=attention, loops=1)
    short = dataclasses.replace(config, layers=2)
    params = random_weights(short)
    everything = dataclasses.replace(short, window_pattern="L")
    ours, full = (logits_at(c, params, TOKENS, (1,))[0] for c in (short, everything))
    np.testing.assert_allclose(ours[:, :2], full[:, :2], atol=1e-5)  # a window of 2 keys
    assert np.abs(ours[:, 2:] - full[:, 2:]).max() > 1e-2


def test_rope_golden_within_the_rounding_of_its_tables():
    x = jnp.arange(1.0, 9.0)
    found = rotate(x.reshape(1, 1, 1, 8), rope_tables(jnp.array([2]), 8, jnp.float32)).ravel()
    golden = np.array([4.1303, 3.1521, 3.1394, 4.016, -2.99, 5.4831, 6.9386, 7.992])
    rounding = 2.0**-9 * (x + jnp.roll(x, 4))  # bfloat16 keeps 8 bits of cosine and sine
    assert (np.abs(found - golden) <= rounding + 1e-4).all()
    assert np.abs(found - golden).max() > 1e-3  # the reference rounds, so must we


def test_wanted_loops_must_exist():
    config = small("FLT")
    with pytest.raises(ValueError, match="loops 0 to 2"):
        transformer.forward(config, random_weights(config), TOKENS, return_loops=(3,))


@pytest.mark.parametrize("loops", [1, 4])
def test_weights_do_not_know_the_number_of_loops(loops):
    shapes = jax.eval_shape(
        lambda: transformer.init_params(small("FLT", loops=loops), jax.random.key(0))
    )
    assert all(leaf.ndim == 2 for leaf in shapes.values())
    assert {k: v.shape for k, v in shapes.items()}["blocks.0.mlp.up"] == (48, 192)


def test_fresh_weights_follow_the_recipe():
    config = small("FLT", attention="mla", latent_rank=16)
    params = transformer.init_params(config, jax.random.key(0))
    assert params["embed"].shape == (128, 48) and params["head"].shape == (48, 128)
    np.testing.assert_allclose(params["embed"].std(), 1, rtol=0.03)
    np.testing.assert_allclose(params["head"].std(), 0.001, rtol=0.03)
    for name, fan_in in (("attention.query", 48), ("attention.key", 16), ("mlp.up", 48)):
        weight, bound = params[f"blocks.1.{name}"], (3 / fan_in) ** 0.5
        assert 0.98 * bound < np.abs(weight).max() <= bound
        np.testing.assert_allclose(weight.std(), fan_in**-0.5, rtol=0.05)
    for name in ("attention.out", "mlp.down"):
        assert not params[f"blocks.1.{name}"].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ways_of_a_tpu_give_the_numbers_of_the_others(dtype):
    """Its matrix unit swaps halves exactly; means differ in the order of their sums alone."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8)).astype(dtype)
    rope = rope_tables(jnp.arange(5), 8, x.dtype)
    np.testing.assert_array_equal(
        *(jax.jit(way)(x, *rope) for way in (block._rotate_whole, block._rotate_halves))
    )
    wide = x.astype(jnp.float32)
    np.testing.assert_allclose(norm._mean_by_product(wide), norm._mean(wide), rtol=1e-4, atol=1e-6)


def test_rotation_and_norm_have_the_gradients_of_their_formulas():
    x, weights = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 8))
    cos, sin = rope = rope_tables(jnp.arange(5), 8, jnp.float32)

    def written_out(x):
        a, b = jnp.split(x, 2, axis=-1)
        x = jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.finfo(x.dtype).eps)

    ours, plain = (
        jax.grad(lambda x, f=f: (f(x) * weights).sum())(x)
        for f in (lambda x: norm.rms_norm(rotate(x, rope)), written_out)
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
