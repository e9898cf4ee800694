"""The PyTorch model against the reference's own numbers, and facts that hold exactly."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_ref.config import VARIANTS, ModelConfig
from torch_ref.loss import bits_per_byte, nats_and_bytes, score, scored_loops, token_losses
from torch_ref.model import LoopedTransformer, norm, rope_tables, rotate, window_mask

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FORWARD = sorted(p.stem for p in GOLDEN.glob("*.npz") if not p.stem.startswith("train_"))
TINY = ModelConfig(
    variant="FLT", layers=3, loops=3, width=16, heads=2, kv_heads=2, seq_len=16, vocab_size=61
)


def load(name, **options):
    """The golden case's model, weights in place, and its arrays as tensors."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        config = ModelConfig.from_reference(json.loads(str(file["config"])))
        arrays = {k: torch.from_numpy(file[k]) for k in file.files if k != "config"}
    model = LoopedTransformer(config, **options)
    model.load_state_dict(under("param/", arrays))  # strict: the layout is the reference's own
    return model, arrays


def under(prefix, arrays):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def random_model(config, scale=0.5, **options):
    """A model whose zero-initialised projections do not hide what the layers do."""
    model = LoopedTransformer(config, **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                weight.copy_(torch.randn(weight.shape, generator=rng) * scale)
    return model


def some_tokens(config, batch=2, length=12, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=rng)


def gradients(model, tokens, targets, loops=None):
    model.zero_grad()
    score(model, tokens, targets, loops).objective.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


def assert_close(got, want, atol):
    torch.testing.assert_close(got, want, rtol=0, atol=atol, check_dtype=False)


# -------------------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_forward_is_the_references(name, dtype):
    model, golden = load(name, dtype=dtype)
    with torch.no_grad():
        loops = model.config.loops
        logits = model.logits(golden["tokens"], {1, 2, 3, 5, loops})
        for k in (1, 2, 3, 5):
            assert_close(logits[k], golden[f"logits_K{k}"], atol=2e-5)
        assert_close(logits[loops], golden["logits"], atol=2e-5)
        nats = token_losses(logits[loops], golden["targets"])
        assert_close(nats, golden["loss_per_token"], atol=2e-5)
        scores = score(model, golden["tokens"], golden["targets"])
    assert_close(scores.losses, golden["losses"], atol=2e-5)
    assert_close(scores.objective, golden["loss"], atol=2e-5)
    assert_close(scores.norms, golden["hidden_norms"], atol=2e-5)
    assert logits[loops].dtype == dtype


@pytest.mark.parametrize("name", FORWARD)
def test_gradients_are_the_references(name):
    model, golden = load(name)
    ours = gradients(model, golden["tokens"], golden["targets"])
    theirs = under("grad/", golden)
    assert ours.keys() == theirs.keys()
    for weight, want in theirs.items():
        assert relative_error(ours[weight], want) < 1e-4, weight


@pytest.mark.parametrize("name", ["FLT_K3_END", "FLT_K3_MLA", "LT_K4_FEW"])
def test_bfloat16_computes_in_bfloat16_on_float32_weights(name):
    model, golden = load(name, dtype=torch.bfloat16)
    states = model(golden["tokens"])
    logits = model.head(states.hidden[-1])
    ours = gradients(model, golden["tokens"], golden["targets"])
    assert {h.dtype for h in states.hidden} == {torch.bfloat16}
    assert {logits.dtype, states.norms.dtype} == {torch.float32}
    assert {g.dtype for g in ours.values()} == {torch.float32}
    # 8 bits of mantissa through K loops: a few percent, and no more.
    assert relative_error(logits, golden["logits"]) < 0.03
    theirs = torch.cat([golden[f"grad/{weight}"].flatten() for weight in ours])
    assert relative_error(torch.cat([g.flatten() for g in ours.values()]), theirs) < 0.05


def test_rope_turns_half_split_pairs_by_tables_rounded_to_bfloat16():
    angle = torch.outer(torch.arange(4.0), torch.tensor([1, 0.1, 0.01, 0.001]))
    cos, sin = rope_tables(4, head_dim=8)
    assert torch.equal(cos, angle.cos().bfloat16()) and torch.equal(sin, angle.sin().bfloat16())
    turned = rotate(torch.arange(1.0, 9.0), angle[2].cos(), angle[2].sin())
    want = torch.tensor([4.1303, 3.1521, 3.1394, 4.016, -2.99, 5.4831, 6.9386, 7.992])
    assert_close(turned, want, atol=6e-5)


# ------------------------------------------------------------------------------------ exact facts


def test_all_variants_are_one_plain_transformer_at_one_loop():
    tokens = some_tokens(TINY)
    with torch.no_grad():
        plain, *others = (
            random_model(replace(TINY, variant=v)).logits(tokens, {1})[1] for v in VARIANTS
        )
    assert plain.abs().max() > 0.1
    assert all(torch.equal(other, plain) for other in others)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh_logits_do_not_depend_on_loops(variant):
    config = replace(TINY, variant=variant)
    model = LoopedTransformer(config, dtype=torch.float64)
    with torch.no_grad():
        at = model.logits(some_tokens(config), {1, 3, 6})
    assert at[1].abs().max() > 0
    assert_close(at[3], at[1], atol=1e-8)
    assert_close(at[6], at[1], atol=1e-8)


FRESH_GRADIENT_GROWTH = {  # the loops that reach the loss, and by how much, at K = 1, 3, 6, 12
    "LT": (1, 3, 6, 12),
    "LT_i": (1, 2 - 2**-2, 2 - 2**-5, 2 - 2**-11),
    "LT_ia": (1, 1, 1, 1),
    "FLT": (1, 1, 1, 1),
}


@pytest.mark.parametrize("variant", FRESH_GRADIENT_GROWTH)
def test_gradient_norm_of_fresh_blocks_grows_with_loops_as_the_rule_says(variant):
    want = FRESH_GRADIENT_GROWTH[variant]
    assert fresh_gradient_growth(TINY, variant) == pytest.approx(want, rel=1e-5)


def test_gradient_norm_of_fresh_blocks_grows_with_loops_under_FLT_res():
    # Measured on the reference at this width, not derived: each draw of the weights differs a bit.
    growth = fresh_gradient_growth(replace(TINY, width=192), "FLT_res")
    assert growth == pytest.approx([1, 1.949, 3.040, 4.279], rel=0.01)


def fresh_gradient_growth(config, variant):
    """Gradient norm of the shared blocks at K = 1, 3, 6, 12 loops over that at one."""
    model = LoopedTransformer(replace(config, variant=variant), dtype=torch.float64).double()
    with torch.no_grad():  # LT_i halves what a loop passes on exactly when e has unit RMS
        model.transformer.wte.weight.copy_(norm(model.transformer.wte.weight))
    tokens, targets = some_tokens(config), some_tokens(config, seed=7)
    norms = []
    for loops in (1, 3, 6, 12):
        named = gradients(model, tokens, targets, loops)
        blocks = [g.flatten() for name, g in named.items() if ".h." in name]
        norms.append(torch.cat(blocks).norm().item())
    return [n / norms[0] for n in norms]


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_query_injection_leaves_the_first_position_alone(variant):
    config = replace(TINY, variant=variant)
    with torch.no_grad():
        at = random_model(config).logits(some_tokens(config), {1, 4})
    first_moved, last_moved = ((at[4] - at[1])[:, i].abs().max() for i in (0, -1))
    assert last_moved > 1e-3
    assert (first_moved == 0) == (variant in ("FLT", "LT_ia"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_query_injection_keeps_the_first_layers_keys_over_loops(variant):
    model = random_model(replace(TINY, variant=variant))
    keys = []
    model.transformer.h[0].attn.c_k.register_forward_hook(lambda *call: keys.append(call[-1]))
    with torch.no_grad():
        model(some_tokens(TINY))
    assert len(keys) == TINY.loops
    same = all(torch.equal(k, keys[0]) for k in keys[1:])
    assert same == (variant in ("FLT", "LT_ia"))


# ------------------------------------------------------- what the reference has wrong, or lacks


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_loops_have_the_same_gradients(variant):
    config = replace(TINY, variant=variant, loss="STEP")
    tokens, targets = some_tokens(config), some_tokens(config, seed=7)
    kept = gradients(random_model(config), tokens, targets)
    recomputed = gradients(random_model(config, recompute_loops=True), tokens, targets)
    for name, want in kept.items():
        assert relative_error(recomputed[name], want) < 1e-6, name


def test_compiled_model_is_the_eager_one():
    config = replace(TINY, layers=1, loops=2, loss="STEP")
    model = random_model(config)
    tokens, targets = some_tokens(config), some_tokens(config, seed=7)
    eager, eager_gradients = model(tokens), gradients(model, tokens, targets)
    compiled = torch.compile(model, fullgraph=True)  # fullgraph: a graph break is an error
    states = compiled(tokens)
    loss = sum(token_losses(model.head(h), targets).mean() for h in states.hidden) / 2
    model.zero_grad()
    loss.backward()
    assert_close(torch.stack(states.hidden), torch.stack(eager.hidden), atol=2e-5)
    assert_close(states.norms, eager.norms, atol=2e-5)
    for name, weight in model.named_parameters():
        assert relative_error(weight.grad, eager_gradients[name]) < 1e-4, name


@pytest.mark.parametrize("attention", ["full", "mla"])
def test_short_window_hides_older_keys_under_both_attentions(attention):
    config = replace(TINY, attention=attention, latent_rank=8, window_pattern="SL")
    window = config.windows[0]
    assert config.windows == (4, None, None)
    model = random_model(config)
    outputs = []
    model.transformer.h[0].register_forward_hook(lambda *call: outputs.append(call[-1]))
    tokens = some_tokens(config, batch=1)
    changed = tokens.clone()
    changed[0, 2] = (tokens[0, 2] + 1) % config.vocab_size
    with torch.no_grad():
        model(tokens, loops=1)
        model(changed, loops=1)
    moved = (outputs[0] - outputs[1]).abs().amax(dim=(0, 2)) > 1e-7
    assert moved.nonzero().flatten().tolist() == list(range(2, 2 + window))


def test_window_counts_the_query_itself_and_full_rows_need_no_mask():
    mask = window_mask(2, 4, torch.device("cpu"))
    want = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert mask.int().tolist() == want
    assert window_mask(None, 4, torch.device("cpu")) is None
    assert window_mask(4, 4, torch.device("cpu")) is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_honours_the_loss_rule(variant):
    config = replace(TINY, variant=variant, loops=4, loss="FEW")
    model = random_model(config)
    tokens, targets = some_tokens(config), some_tokens(config, seed=7)
    targets[:, ::3] = -100  # any negative target is ignored
    with torch.no_grad():
        scores = score(model, tokens, targets)
        for loop, loss in zip((2, 3), scores.losses, strict=True):
            logits = model.head(model(tokens).hidden[loop])
            by_hand = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            assert_close(loss, by_hand[targets >= 0].mean(), atol=1e-6)
    assert_close(scores.objective, scores.losses.mean(), atol=0)


def test_scored_loops():
    assert [list(scored_loops(loss, 6)) for loss in ("END", "FEW", "STEP")] == [
        [5], [4, 5], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip
    assert all(list(scored_loops(loss, 1)) == [0] for loss in ("END", "FEW", "STEP"))


def test_bits_per_byte_is_a_ratio_of_sums_over_targets_with_bytes():
    byte_lengths = torch.tensor([0, 1, 4])  # token 0 is special
    targets = torch.tensor([[0, 1], [2, -1]])
    nats = torch.tensor([[9.0, 2.0], [3.0, 9.0]])
    sums = nats_and_bytes(nats, targets, byte_lengths)
    assert sums == (5.0, 5)
    assert bits_per_byte(*sums) == pytest.approx(1 / math.log(2))
    with pytest.raises(ValueError, match="n_bytes=0"):
        bits_per_byte(0.0, 0)


# ------------------------------------------------------------------------ weights and bad input


def test_fresh_weights_have_the_stated_spread():
    config = replace(TINY, width=64, attention="mla", latent_rank=16, vocab_size=500)
    weights = dict(LoopedTransformer(config).named_parameters())
    assert weights["transformer.wte.weight"].std().item() == pytest.approx(1, rel=0.05)
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.05)
    for name, fan_in in (("attn.c_q", 64), ("attn.c_kv_down", 64), ("mlp.c_fc", 64),
                         ("attn.c_k_up", 16), ("attn.c_v_up", 16)):  # fmt: skip
        reach = weights[f"transformer.h.1.{name}.weight"].abs().max().item()
        assert reach == pytest.approx(math.sqrt(3 / fan_in), rel=0.02) and reach**2 <= 3 / fan_in
    assert not any(w.any() for name, w in weights.items() if "c_proj" in name)
    again, other = LoopedTransformer(config, seed=0), LoopedTransformer(config, seed=1)
    assert torch.equal(again.lm_head.weight, weights["lm_head.weight"])
    assert not torch.equal(other.lm_head.weight, weights["lm_head.weight"])


def test_reference_description_reads_back():
    meta = {"step": 7, "model_config": TINY.to_reference()}
    assert meta["model_config"]["K"] == 3 and meta["model_config"]["model_type"] == "FLT"
    assert ModelConfig.from_reference(meta) == TINY
    with pytest.raises(ValueError, match=r"unknown fields \['dropout'\]"):
        ModelConfig.from_reference({**TINY.to_reference(), "dropout": 0.1})
    with pytest.raises(ValueError, match=r"lacks \['K'\]"):
        ModelConfig.from_reference({k: v for k, v in TINY.to_reference().items() if k != "K"})


@pytest.mark.parametrize(
    "field, value",
    [
        ("variant", "TLF"), ("loss", "ALL"), ("attention", "sparse"), ("loops", 0),
        ("layers", 1.5), ("width", 18), ("kv_heads", 3), ("window_pattern", "SX"),
    ],
)  # fmt: skip
def test_impossible_config_names_its_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value!r}"):
        replace(TINY, **{field: value})


def test_impossible_calls_say_what_to_give_instead():
    model = LoopedTransformer(TINY)
    with pytest.raises(ValueError, match="loops=0"):
        model(some_tokens(TINY), loops=0)
    with pytest.raises(ValueError, match="161 positions"):
        model(some_tokens(TINY, length=161))
    with pytest.raises(ValueError, match="loop_counts"):
        model.logits(some_tokens(TINY), {0, 1})
