"""The PyTorch recipe against the reference's own training runs, and Muon by itself."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_ref.config import ModelConfig
from torch_ref.loss import score
from torch_ref.model import LoopedTransformer
from torch_ref.optim import Muon, OptimConfig, Recipe, lr_multiplier, muon_momentum, orthogonalize

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
# bfloat16 Newton–Schulz rounds differently with every order of summation; the reference's own
# float32 and bfloat16 runs of one case lie up to 6e-4 apart.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-3}
TINY = ModelConfig(
    variant="FLT", layers=2, loops=2, width=16, heads=2, kv_heads=1, seq_len=16, vocab_size=61
)


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        config, hyper = (json.loads(str(file[key])) for key in ("config", "hyper"))
        arrays = {k: torch.from_numpy(file[k]) for k in file.files if k not in ("config", "hyper")}
    model = LoopedTransformer(ModelConfig.from_reference(config))
    model.load_state_dict(under("param0/", arrays))
    return model, arrays, hyper


def under(prefix, arrays):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def train_step(model, recipe, step, micro_batches):
    """One step on [accum, B, T+1]; the last micro-batch's reported loss, and the step's facts."""
    for batch in micro_batches:
        scores = score(model, batch[:, :-1], batch[:, 1:])
        (scores.objective / len(micro_batches)).backward()
    return scores.losses[-1].item(), recipe.step(step)


def random_batch(seed, rows=2):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (1, rows, 13), generator=rng)


# -------------------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize(
    "name", ["train_FLT_K3_ns_fp32", "train_LT_K2_STEP_ns_fp32", "train_FLT_K3_ns_bf16"]
)
def test_training_is_the_references(name):
    model, golden, hyper = load(name)
    recipe = Recipe(
        model,
        OptimConfig(
            steps=hyper["steps"],
            matrix_lr=hyper["matrix_lr"],
            embedding_lr=hyper["embedding_lr"],
            unembedding_lr=hyper["unembedding_lr"],
            weight_decay=hyper["weight_decay"],
            grad_clip_norm=hyper["grad_clip"],
            warmdown_ratio=hyper["warmdown_ratio"],
            newton_schulz_dtype=getattr(torch, hyper["newton_schulz_dtype"]),
        ),
    )
    tolerance = LOSS_TOLERANCE[hyper["newton_schulz_dtype"]]
    for step, micro_batches in enumerate(golden["tokens"]):
        loss, facts = train_step(model, recipe, step, micro_batches)
        assert loss == pytest.approx(golden["losses"][step].item(), abs=tolerance)
        assert facts.grad_norm.item() == pytest.approx(
            golden["grad_norms"][step].item(), abs=tolerance
        )
        assert facts.lr_multiplier == pytest.approx(golden["lr_multiplier"][step].item())
        assert facts.muon_momentum == pytest.approx(golden["muon_momentum"][step].item())
    if hyper["newton_schulz_dtype"] == "float32":
        for weight, value in model.named_parameters():
            want, start = golden[f"param/{weight}"], golden[f"param0/{weight}"]
            travelled = (want - start).norm()
            assert (value.detach() - want).norm() < 1e-4 * travelled, weight


# ------------------------------------------------------------------------------------------ Muon


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 32)])
def test_orthogonalize_keeps_directions_and_evens_out_their_strength(shape):
    rng = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=rng)
    done = orthogonalize(matrix[None], torch.float32)[0]
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    strength = u.mT @ done @ vh.mT  # in the matrix's own singular basis
    assert torch.allclose(strength, strength.diagonal().diag(), atol=1e-4)
    assert strength.diagonal().min() > 0.6 and strength.diagonal().max() < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batched_matrices_move_as_if_alone(dtype):
    rng = torch.Generator().manual_seed(0)
    shapes = [(8, 16), (16, 8), (8, 16), (8, 8), (8, 16)]
    start = [torch.randn(s, generator=rng) for s in shapes]
    grads = [torch.randn(s, generator=rng) for s in shapes]
    together = [torch.nn.Parameter(w.clone()) for w in start]
    alone = [torch.nn.Parameter(w.clone()) for w in start]
    optimizers = [Muon(together, newton_schulz_dtype=dtype)]
    optimizers += [Muon([w], newton_schulz_dtype=dtype) for w in alone]
    for _ in range(3):
        for one, other, grad in zip(together, alone, grads, strict=True):
            one.grad, other.grad = grad.clone(), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, was in zip(together, alone, start, strict=True):
        assert not torch.equal(one, was)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if dtype.itemsize == 4 else 1e-3)


def test_muon_takes_the_formulas_step():
    rng = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 24, 6, generator=rng)
    weight = torch.nn.Parameter(torch.zeros(24, 6))
    muon = Muon([weight], lr=0.5, momentum=0.9, newton_schulz_dtype=torch.float32)
    buffer, want = torch.zeros(24, 6), torch.zeros(24, 6)
    for grad in (first, second):
        weight.grad = grad.clone()
        muon.step()
        buffer = 0.9 * buffer + 0.1 * grad
        nesterov = 0.1 * grad + 0.9 * buffer
        want = want - 0.5 * math.sqrt(24 / 6) * orthogonalize(nesterov[None], torch.float32)[0]
    torch.testing.assert_close(weight.detach(), want, rtol=0, atol=1e-4)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"\(3,\) is no matrix"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


# ---------------------------------------------------------------------------------------- recipe


def test_every_weight_has_one_optimizer_and_its_rate():
    model = LoopedTransformer(TINY)
    recipe = Recipe(model, OptimConfig(steps=10))
    (muon,), (head, embedding) = recipe.muon.param_groups, recipe.adamw.param_groups
    owned = [*muon["params"], *head["params"], *embedding["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model.parameters()}
    assert len(owned) == len(list(model.parameters()))
    assert head["params"][0] is model.lm_head.weight
    scale = math.sqrt(768 / 16)
    assert [muon["lr"], head["lr"], embedding["lr"]] == pytest.approx(
        [0.02, 0.004 * scale, 0.2 * scale]
    )


def test_clipping_is_by_the_norm_of_all_gradients_together():
    model = LoopedTransformer(TINY)
    recipe = Recipe(model, OptimConfig(steps=10, grad_clip_norm=0.25))
    rng = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=rng)
    size = math.sqrt(sum(w.numel() for w in model.parameters()))
    facts = recipe.step(0)
    assert facts.grad_norm.item() == pytest.approx(size, rel=0.05)
    # The first moments hold a known share of the gradient that the optimizers were given.
    seen = [s["momentum_buffer"] / (1 - 0.85) for s in recipe.muon.state.values()]
    seen += [s["exp_avg"] / (1 - 0.8) for s in recipe.adamw.state.values()]
    assert torch.cat([g.flatten() for g in seen]).norm().item() == pytest.approx(0.25, rel=1e-4)
    assert all(w.grad is None for w in model.parameters())


def test_schedule():
    config = OptimConfig(steps=20, warmup_ratio=0.2, warmdown_ratio=0.5, final_frac=0.1)
    rates = [lr_multiplier(step, config) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[10] == 1.0
    assert rates[11] == pytest.approx(0.9 + 0.1 * 0.1)
    assert rates[19] == pytest.approx(0.1 + 0.9 * 0.1)
    assert [muon_momentum(s) for s in (0, 150, 300, 999)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    # Python rounds halves to even: 0.5 · 5 steps of warm-down are 2, not 3.
    halves = OptimConfig(steps=5, warmdown_ratio=0.5)
    assert [lr_multiplier(s, halves) for s in range(5)] == [1, 1, 1, 1, 0.5]
    with pytest.raises(ValueError, match="step=5"):
        lr_multiplier(5, halves)


def test_resumed_run_is_the_uninterrupted_one():
    def begin():
        model = LoopedTransformer(TINY)
        return model, Recipe(model, OptimConfig(steps=4))

    model, recipe = begin()
    for step in range(4):
        if step == 2:
            saved = io.BytesIO()
            torch.save({"model": model.state_dict(), "optim": recipe.state_dict()}, saved)
        train_step(model, recipe, step, random_batch(step))

    resumed, recipe = begin()
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    resumed.load_state_dict(state["model"])
    recipe.load_state_dict(state["optim"])
    for step in (2, 3):
        train_step(resumed, recipe, step, random_batch(step))
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "field, value", [("steps", 0), ("warmdown_ratio", 1.5), ("grad_clip_norm", 0.0)]
)
def test_impossible_recipe_names_its_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value}"):
        OptimConfig(**{"steps": 10, field: value})
