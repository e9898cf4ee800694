"""Drawn loop counts: distributions by their definitions, curricula, and what a draw depends on."""

import dataclasses

import jax
import numpy as np
import pytest

from looped_jax import train
from looped_jax.config import presets
from looped_jax.config.options import LoopDistributions
from looped_jax.config.registry import LOOP_DISTRIBUTIONS
from looped_jax.config.settings import (
    LoopSamplingConfig,
    ModelSettings,
    Settings,
    TrainSettings,
    all_settings,
)
from looped_jax.errors import CheckpointError, ConfigError
from looped_jax.model import flops, loop_costs, transformer
from looped_jax.resolve import resolve, run_name
from looped_jax.training import fingerprint, resumption
from looped_jax.training.checkpoint import load_params
from looped_jax.training.loop_distributions import LogNormalPoissonSettings, UniformSettings
from looped_jax.training.loop_sampler import LoopSampler
from looped_jax.training.metric_log import read_log
from looped_jax.training.run_folder import read_config

DRAWS = 200_000


def config_of(distribution="fixed", *, loops=8, own=None, rows=8, model=None, **sampling):
    distributions = LoopDistributions({distribution: own} if own else {})
    sizes = {"layers": 1, "width": 16, "heads": 1, "seq_len": 8, "loops": loops}
    return resolve(
        Settings(
            model=ModelSettings(**sizes | (model or {})),
            train=TrainSettings(
                steps=100,
                tokens_per_step=8 * rows,
                loop_sampling=LoopSamplingConfig(
                    distribution=distribution, distributions=distributions, **sampling
                ),
            ),
        ),
        vocab_size=97,
    )


def probabilities(distribution, loops, own=None):
    config = config_of(distribution, loops=loops, own=own)
    sampling = config.train.loop_sampling
    return LOOP_DISTRIBUTIONS[distribution]().probabilities(sampling, loops)


def moments(probabilities):
    counts = np.arange(1, len(probabilities) + 1)
    mean = counts @ probabilities
    return mean, np.square(counts - mean) @ probabilities


@pytest.mark.parametrize("name", LOOP_DISTRIBUTIONS)
def test_probabilities_sum_to_one(name):
    found = probabilities(name, 8)
    assert (found >= 0).all() and found.sum() == pytest.approx(1, abs=1e-12)


def test_moments_are_those_of_the_definitions():
    assert moments(probabilities("fixed", 8)) == (8, 0)
    found = moments(probabilities("uniform", 8, UniformSettings(counts=(4, 6, 8))))
    assert found == pytest.approx((6, 8 / 3))
    assert moments(probabilities("poisson", 8)) == pytest.approx((8, 7))
    # max(1, Poisson(8)): one where there would be none
    none = np.exp(-8)
    mean, square = 8 + none, 64 + 8 + none
    assert moments(probabilities("truncated_poisson", 8)) == pytest.approx((mean, square - mean**2))
    # Poisson(rate) + 1: the mean of the rate, and its variance beside it
    for loops, sigma in ((4, 0.5), (32, 0.5), (32, 1.0)):
        found = probabilities("log_normal_poisson", loops, LogNormalPoissonSettings(sigma=sigma))
        spread = loops**2 * (np.exp(sigma**2) - 1)
        assert moments(found) == pytest.approx((loops + 1, loops + spread), rel=1e-6)


@pytest.mark.parametrize(("loops", "sigma"), [(4, 0.5), (32, 0.5), (8, 1.0)])
def test_log_normal_poisson_is_what_huginn_draws(loops, sigma):
    """Its two draws, a rate and then a count, against the probabilities; 5 standard errors."""
    random = np.random.default_rng(0)
    rates = random.lognormal(np.log(loops) - sigma**2 / 2, sigma, DRAWS)
    drawn = np.bincount(random.poisson(rates))
    found = probabilities("log_normal_poisson", loops, LogNormalPoissonSettings(sigma=sigma))
    wanted = found[: len(drawn)]
    error = np.sqrt(wanted * (1 - wanted) / DRAWS)
    assert (np.abs(drawn / DRAWS - wanted) <= 5 * error + 2 / DRAWS).all()


def test_the_longest_count_takes_what_is_beyond_it():
    whole = probabilities("log_normal_poisson", 4)
    cut = probabilities("log_normal_poisson", 4, LogNormalPoissonSettings(most=16))
    assert len(cut) == 16 and cut[-1] == pytest.approx(whole[15:].sum())
    np.testing.assert_array_equal(cut[:-1], whole[:15])


@pytest.mark.parametrize("name", [n for n in LOOP_DISTRIBUTIONS if n != "fixed"])
def test_draws_follow_the_probabilities(name):
    sampler = LoopSampler(config_of(name, rows=DRAWS, per="sequence"))
    drawn = np.bincount(sampler.draw(1), minlength=2)[1:] / DRAWS
    wanted = probabilities(name, 8)[: len(drawn)]
    assert (np.abs(drawn - wanted) <= 5 * np.sqrt(wanted / DRAWS) + 2 / DRAWS).all()
    assert sampler.expected(1) == pytest.approx(moments(probabilities(name, 8))[0])


def test_a_draw_depends_on_seed_step_and_row_alone():
    few, many = (
        LoopSampler(config_of("poisson", rows=n, per="sequence", backward_loops=3)) for n in (8, 32)
    )
    np.testing.assert_array_equal(few.draw(5), many.draw(5)[:8])
    assert list(few.draw(5)) != list(few.draw(6))
    config = config_of("poisson", per="sequence")
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    assert list(LoopSampler(other).draw(5)) != list(few.draw(5))
    columns = many.columns(5)
    np.testing.assert_array_equal(columns["loops"], many.draw(5))
    assert (columns["backward_loops"] == 3).all()


def test_all_rows_of_a_step_run_one_count():
    sampler = LoopSampler(config_of("poisson"))
    steps = [set(sampler.draw(step).tolist()) for step in range(1, 30)]
    assert all(len(counts) == 1 for counts in steps) and len(set.union(*steps)) > 5


def test_off_nothing_is_drawn():
    sampler = LoopSampler(config_of())
    assert not sampler.on and sampler.columns(1) == {} and sampler.describe() == []


@pytest.mark.parametrize(
    ("curriculum", "share", "wanted"),  # of 8 loops after 0, 25, 49, 50 and 99 of 100 steps
    [
        ("none", 1.0, [8, 8, 8, 8, 8]),
        ("linear", 1.0, [1, 2, 4, 4, 8]),
        ("linear", 0.5, [1, 4, 8, 8, 8]),
        ("sqrt", 1.0, [1, 2, 3, 3, 8]),
        ("switch", 0.5, [1, 1, 1, 8, 8]),
    ],
)
def test_curricula_raise_counts_and_gradients(curriculum, share, wanted):
    steps = (1, 26, 50, 51, 100)
    settings = {} if curriculum == "none" else {"curriculum_share": share}
    forward = LoopSampler(config_of(curriculum=curriculum, **settings))
    assert [forward.draw(step)[0] for step in steps] == wanted
    assert [forward.expected(step) for step in steps] == wanted
    backward = LoopSampler(config_of(backward_curriculum=curriculum, **settings))
    assert [backward.backward(step) for step in steps] == wanted
    assert backward.draw(1)[0] == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curriculum_share": 0.5}, "curriculum_share=0.5 has no curriculum to end"),
        ({"per": "sequence", "backward_loops": 2}, "per=sequence: with .*=fixed all sequences"),
        ({"backward_loops": 9}, "backward_loops=9 is more than the 8 loops that .*=fixed gives"),
        (
            {"distribution": "poisson", "model": {"loss": "STEP"}},
            "model.loss=STEP reads loops before the last, .*; give model.loss=END",
        ),
        ({"backward_loops": 2, "model": {"loss": "FEW"}}, "model.loss=FEW reads loops before"),
        (
            {"distribution": "uniform", "own": UniformSettings(counts=(4, 0))},
            r"uniform.counts=\(4, 0\) must be whole numbers from 1",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoopSampler(config_of(**settings))


def test_a_rule_that_reads_the_embedding_once_is_warned_of():
    starved, fed = (
        LoopSampler(config_of(backward_loops=2, model={"variant": name})).describe()
        for name in ("LT", "FLT")
    )
    assert len(fed) == 1 and len(starved) == 2
    assert starved[1].startswith("warning: model.variant=LT reads the embedding in the first loop")
    every = LoopSampler(config_of(curriculum="linear", model={"variant": "LT"}))
    assert len(every.describe()) == 1  # gradients pass all loops


def test_flops_are_those_of_the_loops_that_were_run():
    config = config_of("poisson", loops=4)
    three, four = (flops.count(config_of(loops=k).model).flops for k in (3, 4))
    assert loop_costs.step_flops(config.model, 4, 4) == four
    assert loop_costs.step_flops(config.model, 3, 3) == pytest.approx(three)
    assert loop_costs.step_flops(config.model, 7, 3) == pytest.approx(
        three + 4 * (four - three) / 3
    )


def test_it_belongs_to_what_a_run_is():
    plain, drawn = config_of(), config_of("poisson", backward_loops=3)
    assert run_name(drawn) != run_name(plain)
    before, now = (fingerprint.of(c, rows={"data": {}}, hosts=1) for c in (plain, drawn))
    with pytest.raises(CheckpointError, match=r"loop_sampling.distribution: 'fixed' there, 'pois"):
        fingerprint.check(before, now, run_dir="there")
    del before["train"]["loop_sampling"]  # an older run
    fingerprint.check(before, fingerprint.of(plain, rows={"data": {}}, hosts=1), run_dir="there")
    assert Settings.from_dict(drawn.to_dict()).train.loop_sampling == drawn.train.loop_sampling
    assert "train.loop_sampling.distributions.log_normal_poisson.sigma" in all_settings()


def test_a_curriculum_cannot_be_made_longer_on_the_way():
    resumption.check_extends(config_of("poisson"), before=90, done=10)
    with pytest.raises(CheckpointError, match="train.loop_sampling would have grown otherwise"):
        resumption.check_extends(config_of(curriculum="linear"), before=90, done=10)


def test_one_of_ones_own_is_a_setting():
    @LOOP_DISTRIBUTIONS.register("even")
    class Even(LOOP_DISTRIBUTIONS["fixed"]):
        """Two or four loops."""

        def probabilities(self, sampling, loops):
            return np.array([0, 0.5, 0, 0.5])

    try:
        sampler = LoopSampler(config_of("even", rows=100, loops=4, per="sequence"))
        assert set(sampler.draw(1).tolist()) == {2, 4}
    finally:
        del LOOP_DISTRIBUTIONS._found["even"]


def run(folder, steps):
    values = presets.make("FLT", "hops")
    values.model.width, values.optim.warmdown_ratio = 32, 0.0
    values.train.update(
        run_dir=str(folder), steps=steps, tokens_per_step=16 * 24, batch_size=1, eval_tokens=64,
        eval_loops=(1, 4), eval_first=False,
    )  # fmt: skip
    values.train.loop_sampling.update(
        distribution="truncated_poisson", per="sequence", backward_loops=2
    )
    for part in ("state_init", "state_noise"):  # which draw random numbers
        values.model.parts[part].on = True
    train.train(Settings.from_dict(values))
    return read_config(folder), [e for e in read_log(folder) if "train/loss" in e]


def test_a_run_goes_on_with_what_it_would_have_drawn(tmp_path):
    run(tmp_path / "parts", steps=3)
    _, parts = run(tmp_path / "parts", steps=6)
    config, whole = run(tmp_path / "whole", steps=6)
    for name in ("train/loss", "loop/drawn", "loop/spent", "loop/backward", "total/flops"):
        assert [e[name] for e in parts] == [e[name] for e in whole]
    shapes = transformer.init_shapes(config.model)
    (_, first), (_, second) = (load_params(str(tmp_path / n), shapes) for n in ("parts", "whole"))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert len({e["loop/drawn"] for e in whole}) > 3
    assert [e["loop/expected"] for e in whole] == pytest.approx([4 + np.exp(-4)] * 6)
    spent = [
        loop_costs.step_flops(config.model, e["loop/spent"], e["loop/backward"]) for e in whole
    ]
    total = config.train.tokens_per_step * np.cumsum(spent)
    np.testing.assert_allclose([e["total/flops"] for e in whole], total)
    assert LoopSampler(config).flops(2) == pytest.approx(total[-1])  # of 16 rows on 8 devices
    peak = np.array([e["speed/flop_utilization"] / e["speed/tokens_per_second"] for e in whole])
    np.testing.assert_allclose(peak / peak[0], np.array(spent) / spent[0])
