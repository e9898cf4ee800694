"""The breakdown: the right part for each operation, bounds from shapes, no time lost."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import breakdown
from looped_jax.config.settings import ModelSettings, Settings
from looped_jax.resolve import resolve

CONFIG = resolve(
    Settings(
        model=ModelSettings(
            layers=2, loops=3, width=16, heads=2, seq_len=8, dtype="float32", remat="loop"
        )
    ),
    vocab_size=64,
)


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(step)/jvp(layer_0)/attention/dot_general", "attention projections"),
        ("jit(step)/transpose(jvp(layer_1))/attention/mix/exp", "attention mixing"),
        ("jit(step)/while/body/layer_0/attention/norm/rsqrt", "norms"),
        ("jit(step)/checkpoint/rematted/attention/rope/mul", "RoPE"),
        ("jit(step)/optimizer/newton_schulz/dot_general", "Newton–Schulz"),
        ("jit(step)/optimizer/add", "other optimizer"),
        ("jit(step)/optimizer/jit(norm)/sqrt", "other optimizer"),
        ("jit(step)/transpose(jvp(embed))/scatter-add", "embedding"),
        ("jit(step)/head/dot_general", "head and loss"),
        ("jit(step)/header/normal/add", "rest"),
    ],
)
def test_scopes_name_parts(scope, part):
    assert breakdown.part_of(scope) == part


def test_operations_of_a_program_are_counted_once():
    program = """
      %fused (p: f32[8]) -> f32[8] {
        ROOT %exp.1 = f32[8]{0} exponential(f32[8]{0} %p), metadata={op_name="jit(f)/mlp/exp"}
      }
      ENTRY %main {
        %dot.3 = f32[8,8]{1,0} dot(%a, %b), metadata={op_name="jit(f)/layer_0/mlp/dot"}
        %while.1 = (s32[], f32[8]{0}) while(%t), body=%b, metadata={op_name="jit(f)/mlp/while"}
        %pair = (f32[8]{0}, f32[8]{0}) fusion(%a), kind=kLoop, metadata={op_name="jit(f)/head/tanh"}
        ROOT %copy.7 = f32[8]{0} copy(%dot.3)
      }"""
    parts = breakdown.parts_of(program)
    assert parts == {
        "exp.1": "MLP", "dot.3": "MLP", "pair": "head and loss", "copy.7": "rest"
    }  # fmt: skip
    events = [("while.1", 9.0), ("dot.3", 1.0), ("dot.3", 2.0), ("pair", 4.0), ("copy.7", 0.5),
              ("not of this program", 7.0)]  # fmt: skip
    assert breakdown.seconds_by_part(events, parts) == {
        "MLP": 3.0, "head and loss": 4.0, "rest": 0.5
    }  # fmt: skip


def test_bounds_follow_from_the_shapes():
    assert breakdown.product(3, 5, 7, 4) == breakdown.Work(2 * 3 * 5 * 7, 4 * (15 + 35 + 21))
    work = breakdown.work_of(CONFIG, rows=2)
    tokens, layers, loops, width = 16, 2, 3, 16
    # forward, two products backward, and once more forward because the loop is recomputed
    assert work["MLP"].flops == 4 * loops * layers * 2 * (2 * tokens * width * 64)
    assert work["attention projections"].flops == 4 * loops * layers * 4 * (2 * tokens * width**2)
    # one chunk of logits is not recomputed
    assert work["head and loss"].flops == 3 * 2 * tokens * width * 64
    # a query sees (T + 1) / 2 keys on average; scores and values take a product each
    assert work["attention mixing"].flops == 4 * loops * layers * 2 * (2 * tokens * 4.5 * width)
    kept = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat="none"))
    assert breakdown.work_of(kept, rows=2)["MLP"].flops == 0.75 * work["MLP"].flops
    machine = breakdown.Roofline(flops=100.0, bandwidth=10.0)
    assert machine.bound(breakdown.Work(50.0, 20.0)) == 2.0  # moving takes longer than computing


def test_the_least_flops_are_those_the_compiler_counts():
    """Of the forward pass at one loop and layer, where nothing is recomputed."""
    model = dataclasses.replace(
        CONFIG.model, loops=1, layers=1, remat="none", seq_len=32, width=128
    )
    config = dataclasses.replace(CONFIG, model=model)
    shapes = jax.eval_shape(lambda: breakdown.transformer.init_params(model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((4, 32), np.int32)

    def forward(params, tokens):
        hidden = breakdown.transformer.forward(model, params, tokens).hidden
        return breakdown.loss.token_losses(model, params, hidden, tokens).sum()

    counted = jax.jit(forward).lower(shapes, tokens).compile().cost_analysis()["flops"]
    work = breakdown.work_of(config, rows=4)
    least = sum(
        work[part].flops / 3
        for part in ("attention projections", "attention mixing", "MLP", "head and loss")
    )
    assert least < counted < 1.15 * least  # plain attention also multiplies what it then masks


def test_a_breakdown_adds_up(tmp_path, capsys, home, monkeypatch):
    programs, compiled = [], breakdown.Step.__init__

    def recorded(self, *arguments, **named):
        compiled(self, *arguments, **named)
        programs.append(self.program.as_text())

    monkeypatch.setattr(breakdown.Step, "__init__", recorded)
    rates = breakdown.Roofline(1e11, 1e10)
    monkeypatch.setattr(breakdown, "measure_roofline", lambda dtype: rates)
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(home / "cache"))
    arguments = {"layers": 1, "width": 16, "loops": 2, "seq_len": 16, "batch_size": 2,
                 "vocab_size": 64, "rounds": 2}  # fmt: skip
    breakdown.main(
        [
            *(f"--{k}={v}" for k, v in arguments.items()),
            f"--data={home / 'text'}",
            f"--out={tmp_path}",
        ]
    )
    assert len(set(programs)) == len(programs) >= 8  # without any of the parts it is another
    found = json.loads((tmp_path / "breakdown.json").read_text())
    parts = {part["part"]: part for part in found["parts"]}
    assert sum(part["trace"] for part in parts.values()) == pytest.approx(found["step_seconds"])
    for name in ("attention projections", "MLP", "head and loss", "Newton–Schulz"):
        assert parts[name]["trace"] > 0 and parts[name]["left_out"] is not None
    assert parts["rest"]["trace"] < 0.6 * found["step_seconds"]
    assert (tmp_path / "breakdown.png").read_bytes().startswith(b"\x89PNG")
    assert "| **step** |" in capsys.readouterr().out
