"""Costs against counts made by hand and by the compiler."""

import jax
import jax.numpy as jnp
import pytest

from looped_jax.config.settings import ModelSettings, Settings
from looped_jax.model import flops, loss, transformer
from looped_jax.resolve import resolve


def model(**settings):
    vocab = settings.pop("vocab", 151_670)
    return resolve(Settings(model=ModelSettings(**settings)), vocab_size=vocab).model


def test_paper_scale():
    found = flops.count(model())
    assert found.looped == 12 * 6 * 384**2 == 10_616_832
    assert found.parameters == pytest.approx(127.1e6, rel=1e-3)
    assert found.flops / found.reference_flops == pytest.approx(3.3, abs=0.1)


def test_loops_and_scored_loops_are_counted():
    one, three = (flops.count(model(loops=k)) for k in (1, 3))
    head = 6 * model().padded_vocab * 384
    assert three.flops - head == 3 * (one.flops - head)
    assert one.flops == one.reference_flops == three.reference_flops
    every = flops.count(model(loops=3, loss="STEP"))
    assert every.flops - three.flops == 2 * head
    assert flops.count(model(loops=3, loss="RANDOM")).flops == three.flops + head


@pytest.mark.parametrize("attention", ["full", "mla"])
def test_parameters_are_those_of_the_model(attention):
    config = model(layers=3, attention=attention, heads=4, kv_heads=2, vocab=100)
    shapes = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
    found = flops.count(config)
    assert found.parameters == sum(leaf.size for leaf in shapes.values())
    looped = sum(leaf.size for name, leaf in shapes.items() if name.startswith("blocks"))
    assert found.looped == looped


def test_windows_make_attention_cheaper():
    full, short = (flops.count(model(layers=4, window_pattern=p)) for p in ("L", "SSSL"))
    saved = 12 * 256 * 3 * (1024 - 256) * 12
    assert full.flops - short.flops == saved


def test_forward_flops_agree_with_the_compiler():
    """XLA counts a scan body once, so one loop is compared; rounding work makes it count more."""
    config = model(layers=2, loops=1, width=128, heads=2, seq_len=64, vocab=512, dtype="float32")
    shapes = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))

    def forward(params, tokens):
        hidden = transformer.forward(config, params, tokens).hidden
        return loss.token_losses(config, params, hidden, tokens)

    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    compiled = jax.jit(forward).lower(shapes, tokens).compile().cost_analysis()["flops"]
    assert compiled == pytest.approx(flops.count(config).flops / 3 * 4 * 64, rel=0.1)


def formula(config):
    """The plain model by hand: 6 FLOPs per weight use, 12 · H · Dh per visible key and layer."""
    kv_width = config.kv_heads * config.head_dim
    kv = 2 * config.width * kv_width
    if config.attention == "mla":
        kv = config.width * config.latent_rank + 2 * config.latent_rank * kv_width
    looped = config.layers * (2 * config.width**2 + kv + 8 * config.width**2)
    keys = sum(min(w or config.seq_len, config.seq_len) for w in config.windows())
    head = 6 * config.padded_vocab * config.width * len(config.scored_loops())
    return head + config.loops * (6 * looped + 12 * config.width * keys)


@pytest.mark.parametrize("remat", ["loop", "none"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 1}, {"attention": "mla"}, {"window_pattern": "SSL", "layers": 4},
     {"loss": "STEP"}, {"loops": 1}, {"loops": 12, "loss": "FEW"}, {"variant": "LT"}],
)  # fmt: skip
def test_what_is_read_off_the_program_is_the_formula(changes, remat):
    config = model(remat=remat, **changes)
    assert flops.count(config).flops == formula(config)
