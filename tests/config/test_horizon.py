"""How long a run is: steps before FLOPs before tokens per parameter; FLOPs with all loops."""

import pytest

from looped_jax.config import horizon, presets
from looped_jax.config.settings import Settings
from looped_jax.model import flops, loop_costs, parameter_counts
from looped_jax.resolve import describe_scale, resolve
from looped_jax.training.loop_sampler import LoopSampler


def settings(**train):
    config = presets.make("FLT", "tiny")
    config.train.steps = None
    sampling = train.pop("loop_sampling", {})
    config.train.update(train)
    config.train.loop_sampling.update(sampling)
    return Settings.from_dict(config)


def resolved(**train):
    return resolve(settings(**train), vocab_size=300)


def test_steps_come_before_flops_and_these_before_tokens():
    many = {"steps": 7, "target_flops": 1e12, "tokens_per_parameter": 3.0}
    assert resolved(**many).train.steps == 7
    del many["steps"]
    config = resolved(**many)
    per_step = flops.count(config.model).flops * config.train.tokens_per_step
    assert config.train.steps == round(1e12 / per_step) > 10
    del many["target_flops"]
    tokens = int(3 * parameter_counts.count(config.model, "all"))
    assert resolved(**many).train.steps == tokens // config.train.tokens_per_step
    assert resolved(target_flops=1.0).train.steps == 1
    by_default = 20 * parameter_counts.count(config.model, "all") // config.train.tokens_per_step
    assert resolved().train.steps == by_default


def test_the_console_says_what_decided():
    for train, reason in (
        ({"steps": 7, "target_flops": 1e12}, "by train.steps=7"),
        ({"target_flops": 1e12}, "by train.target_flops=1e+12"),
        ({}, "by train.tokens_per_parameter=20"),
    ):
        given = settings(**train)
        told = describe_scale(given, resolve(given, vocab_size=300))
        assert told[1].endswith(reason)
    assert told[0].endswith("train.scaled_by=all") and "usage_weighted" in told[0]


SAMPLINGS = [
    {"distribution": "poisson", "backward_loops": 2},
    {"distribution": "truncated_poisson", "per": "sequence", "curriculum": "linear",
     "curriculum_share": 0.5},
    {"curriculum": "switch", "curriculum_share": 0.3, "backward_curriculum": "sqrt"},
]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampled_loops_cost_what_is_drawn_for_them_in_the_mean(sampling):
    """Against the sum over all steps of what is drawn, of rows that end together."""
    train = {"loop_sampling": sampling, "tokens_per_step": 8 * 128, "batch_size": 8}
    config = resolved(steps=2_000, **train)
    drawn = LoopSampler(config).flops(micro_batches=1) / 2_000 / config.train.tokens_per_step
    expected = loop_costs.run_flops(config.model, config.train.loop_sampling, rows=8)
    assert expected == pytest.approx(drawn, rel=0.02)
    budget = 500 * expected * config.train.tokens_per_step
    assert resolved(target_flops=budget, **train).train.steps == 500


def test_flops_are_not_counted_where_steps_are_given():
    def never():
        raise AssertionError

    found = horizon.steps(
        settings(steps=3).train, tokens_per_step=1, parameters=never, flops_per_token=never
    )
    assert found == 3
