"""The learning-rate ramp: its schedule, its points on known curves, what it leaves untouched."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from looped_jax import lr_find
from looped_jax.config.settings import (
    MeshConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
)
from looped_jax.errors import ConfigError
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import lr_range_test, optimizers, train_step
from tests.programs import ROOT, use_few_devices

MODEL = ModelSettings(layers=1, loops=2, width=32, heads=1, seq_len=16, dtype="float32")
CONFIG = resolve(
    Settings(model=MODEL, optim=OptimConfig(newton_schulz_dtype="float32"),
           train=TrainSettings(steps=20)), vocab_size=32
)  # fmt: skip


def batches():
    rng = np.random.default_rng(0)
    while True:  # every token names the next: soon learned
        yield (rng.integers(0, 32, (1, 8, 1)) + np.arange(17)).astype(np.int32) % 32


def test_the_ramp_is_geometric_and_counts_from_its_start():
    schedule = lr_range_test.ramp(1e-3, 10.0, 5, start=7)
    np.testing.assert_allclose([schedule(s) for s in range(7, 12)], 10.0 ** np.arange(-3, 2))


def test_a_sweep_learns_then_breaks_and_leaves_the_state_alone():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optimizers.make_optimizer(CONFIG, mesh, steps=20)
    current = train_step.create(CONFIG, optimizer, mesh)
    before = jax.device_get(current)
    found = lr_range_test.sweep(CONFIG, current, batches(), mesh, low=1e-3, high=3e2, steps=120)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(current), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    assert found.smoothed.min() < 0.8 * found.smoothed[0]
    assert found.steepest <= found.elbow <= found.lowest < found.multipliers[-1]
    # the smoothed loss is the bias-corrected exponential mean
    weights = lr_range_test.SMOOTHING ** np.arange(10)[::-1]
    np.testing.assert_allclose(
        found.smoothed[9], np.sum(weights * found.losses[:10]) / weights.sum(), rtol=1e-6
    )


def test_points_of_a_known_curve():
    rate = 10 ** np.linspace(-3, 1, 161)
    log = np.log10(rate)
    curve = 4 - 2 / (1 + np.exp(-6 * (log + 1))) + np.where(log > 0, 3 * log**2, 0)
    found = lr_range_test.analyse(rate, curve, curve)
    assert found.steepest == pytest.approx(0.1, rel=0.1)  # the logistic's middle
    assert 0.15 < found.elbow < 0.6
    assert 0.8 < found.lowest < 1.5
    with pytest.raises(ConfigError, match="only rose from"):
        lr_range_test.analyse(rate, rate, rate)


def test_overrides_scale_all_rates_of_the_optimizer_in_use():
    text = lr_range_test.overrides(OptimConfig(), 0.5)
    assert text == (
        "--config.optim.matrix_learning_rate=0.01 --config.optim.embedding_learning_rate=0.1 "
        "--config.optim.head_learning_rate=0.002 --config.optim.vector_learning_rate=0.01"
    )
    text = lr_range_test.overrides(OptimConfig(optimizer="adamw"), 2)
    assert "optim.matrix_learning_rate" not in text
    assert text.endswith("--config.optim.optimizers.adamw.matrix_learning_rate=0.006")
    text = lr_range_test.overrides(OptimConfig(), 2, {"matrix", "low_rank"})
    assert text.endswith("--config.optim.groups.low_rank.learning_rate=0.002")


def test_the_program_draws_prints_overrides_and_names_a_missing_run(
    home, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(home / "cache"))
    use_few_devices(monkeypatch)
    sizes = {"data.path": home / "text", "data.tokenizer_vocab_size": 512, "model.width": 32,
             "model.layers": 1, "model.heads": 1, "model.seq_len": 32,
             "train.tokens_per_step": 256, "train.batch_size": 8}  # fmt: skip
    flags = ["--config=configs/flt.py:tiny", *(f"--config.{k}={v}" for k, v in sizes.items())]
    flags.append(f"--out={tmp_path}")
    lr_find.main([*flags, "--loops=1,3", "--steps=60"])
    said = capsys.readouterr().out
    assert "3 loops: steepest at ×" in said
    assert "--config.model.loops=3 --config.optim.matrix_learning_rate=" in said
    assert (tmp_path / "lr_find.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "lr_find.json").read_text()).keys() == {"1", "3"}
    with pytest.raises(SystemExit) as stopped:
        lr_find.main([*flags, "--from_run", f"--config.train.run_dir={tmp_path / 'none'}"])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "no ch" in said and len(said.splitlines()) == 1


def test_loop_counts_start_from_the_same_weights():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optimizers.make_optimizer(CONFIG, mesh, steps=20)
    current = train_step.create(CONFIG, optimizer, mesh)
    deeper = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, loops=5))
    both = [
        lr_range_test.sweep(c, current, batches(), mesh, low=1e-2, high=3.0, steps=24)
        for c in (CONFIG, deeper)
    ]
    # fresh output projections are zero: the first loss does not know the loop count
    assert both[0].losses[0] == pytest.approx(both[1].losses[0], abs=1e-5)
