"""A run goes on longer, starts from another's weights, and keeps milestones and its best."""

import json
import shutil

import numpy as np
import pytest

import looped_jax
from looped_jax.config import presets
from looped_jax.config.settings import OptimConfig, Settings
from looped_jax.errors import ConfigError
from looped_jax.resolve import resolve, run_name
from looped_jax.training import fingerprint, optimizers
from tests.programs import losses, run_here


def steps_of(run):
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


FLAT = "--config.optim.warmdown_ratio=0.0"


def test_a_finished_run_is_extended_where_its_schedule_allows_it(home, tmp_path):
    long, short = tmp_path / "long", tmp_path / "short"
    code, _, err = run_here(home, long, FLAT, steps=8)
    assert code == 0, err
    code, _, err = run_here(home, short, FLAT, steps=4)
    assert code == 0, err
    code, out, err = run_here(home, short, FLAT, steps=8)
    assert code == 0 and "goes on to step 8, not 4" in out, err
    assert losses(short) == losses(long)
    for ours, theirs in zip(
        looped_jax.load(short).params.values(), looped_jax.load(long).params.values(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_whose_rate_has_fallen_is_not_extended_but_started_anew(home, tmp_path):
    run = tmp_path / "run"
    code, _, err = run_here(home, run, "--config.train.eval_every=0", steps=8)
    assert code == 0, err
    code, _, err = run_here(home, run, "--config.train.eval_every=0", steps=12)
    assert code == 1 and "would have been others" in err
    assert f"--config.train.init_from={run}" in err
    before = looped_jax.load(run).params
    for name, more in (("weights", ()), ("optimizer", ("--config.train.init_optimizer=True",))):
        new = tmp_path / name
        none = "--config.optim.matrix_learning_rate=0", "--config.optim.embedding_learning_rate=0"
        none += ("--config.optim.head_learning_rate=0",)
        code, out, err = run_here(
            home, new, f"--config.train.init_from={run}@8", *none, *more, steps=2
        )
        assert code == 0 and f"starting with the weights of {run}@8" in out, err
        for weight, same in zip(looped_jax.load(new).params.values(), before.values(), strict=True):
            np.testing.assert_array_equal(weight, same)
        assert losses(new)[1] < losses(run)[1] - 0.1
    code, _, err = run_here(home, tmp_path / "x", f"--config.train.init_from={run}@z", steps=2)
    assert code == 1 and "'z' is no step; give RUN or RUN@STEP" in err


def test_milestones_and_the_best_are_kept(home, tmp_path):
    run = tmp_path / "run"
    kept = ("--config.train.save_every=1", "--config.train.keep=1", "--config.train.keep_every=3")
    kept += ("--config.train.keep_best=1", "--config.train.eval_every=2")
    high = "--config.optim.matrix_learning_rate=0.9"  # so that later is not better
    code, _, err = run_here(home, run, *kept, high, steps=10)
    assert code == 0, err
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    scores = {e["step"]: e["val/bpb_loops_2"] for e in lines if "val/bpb_loops_2" in e}
    best = min(scores, key=scores.get)
    assert steps_of(run) == sorted({3, 6, 9, 10, best})
    shutil.rmtree(run / "checkpoints" / "10")
    code, out, err = run_here(home, run, *kept, high, steps=10)
    assert code == 0 and "from step 9" in out, err


def test_schedules_that_agree_so_far():
    flat, falling = OptimConfig(warmdown_ratio=0.0), OptimConfig(warmdown_ratio=0.5)
    assert optimizers.same_until(flat, 10, 20, 10) and optimizers.same_until(falling, 10, 20, 5)
    assert not optimizers.same_until(falling, 10, 20, 10)
    assert not optimizers.same_until(OptimConfig(warmup_ratio=0.2), 10, 20, 1)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "FLT_K4_L2_END_D128"),
        ({"model.loops": 6, "mesh.fsdp": 4, "train.batch_size": 4}, "FLT_K6_L2_END_D128"),
        ({"train.seed": 1, "train.steps": 20}, "FLT_K4_L2_END_D128_seed1_steps20"),
        ({"optim.matrix_learning_rate": 0.01}, "FLT_K4_L2_END_D128_matrix_learning_rate0.01"),
        (
            {
                "train.core_every": 5,
                "train.sample_every": 5,
                "train.save_minutes": 1.0,
                "train.eval_first": False,
                "data.core_bundle": "/b",
            },
            "FLT_K4_L2_END_D128",
        ),
        ({"data.path": "/data/shards"}, "FLT_K4_L2_END_D128_path-shards-59d3"),
    ],
)
def test_runs_that_differ_in_what_matters_have_names_of_their_own(changes, name):
    config = presets.make("FLT", "tiny")
    for key, value in changes.items():
        group, setting = key.split(".")
        config[group][setting] = value
    assert run_name(Settings.from_dict(config)) == name


def test_a_name_with_many_differences_is_short_and_its_own():
    names = set()
    for beta in (0.5, 0.6):
        config = presets.make("FLT", "tiny")
        config.model.parts.kv_shift.on = True
        config.train.seed, config.train.steps, config.optim.beta1, config.optim.beta2 = (
            3,
            77,
            0.7,
            beta,
        )
        config.optim.matrix_learning_rate = 0.0123
        names.add(run_name(Settings.from_dict(config)))
    assert len(names) == 2
    assert all(name.startswith("FLT_K4_L2_END_D128_kv_shift_") and len(name) < 80 for name in names)


def test_what_is_only_logged_is_no_other_run():
    found = []
    for train, data in (
        ({}, {}),
        ({"core_every": 5, "sample_every": 5, "save_minutes": 1.0, "eval_first": False,
          "sample_temperature": 0.5, "core_examples": 9}, {"core_bundle": "/b"}),
    ):  # fmt: skip
        config = presets.make("FLT", "tiny")
        config.train.update(train)
        config.data.update(data)
        resolved = resolve(Settings.from_dict(config), vocab_size=300)
        found.append(fingerprint.of(resolved, rows={"data": {}}, hosts=1))
    assert found[0] == found[1]


def test_samples_of_no_tokens_are_refused():
    config = presets.make("FLT", "tiny")
    config.train.sample_every, config.train.sample_tokens = 10, 0
    with pytest.raises(ConfigError, match="train.sample_every=10 with train.sample_tokens=0"):
        Settings.from_dict(config)
