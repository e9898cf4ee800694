"""CORE of a run that is going on: what `evaluate` finds of the same weights; refused in time."""

import json

import numpy as np
import pytest

from looped_jax import evaluate
from looped_jax.config import presets
from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError, DataError
from looped_jax.evaluation import bits_per_byte
from looped_jax.evaluation.core import BundleError, PromptError
from looped_jax.evaluation.core_evaluation import CoreEvaluation
from looped_jax.resolve import resolve
from looped_jax.tasks.task import Task
from tests.evaluation.test_core import write_bundle
from tests.programs import entries, run_here


class Letters:
    """A tokenizer of bytes."""

    bos_id = 256

    def encode(self, text):
        return list(text.encode())


def config(**train):
    settings = presets.make("FLT", "tiny")
    settings.train.update({"core_every": 2} | train)
    return resolve(Settings.from_dict(settings), vocab_size=300)


@pytest.mark.slow
def test_it_is_what_evaluate_finds_and_changes_nothing(home, tmp_path):
    run, bundle = tmp_path / "run", write_bundle(tmp_path / "bundle")
    asked = (f"--config.data.core_bundle={bundle}", "--config.train.core_every=2",
             "--config.train.core_examples=4", "--config.train.save_every=2",
             "--config.train.keep=9")  # fmt: skip
    code, out, err = run_here(home, run, *asked, steps=5)
    assert code == 0, err
    found = {e["step"]: e for e in entries(run) if "core/mean_loops_1" in e}
    assert list(found) == [2, 4, 5]  # and at the end
    names = {f"core/{n}_loops_{k}" for n in ("mean", "one", "two") for k in (1, 2)}
    assert found[2].keys() == {"step"} | names
    assert f"step 4 CORE: {found[4]['core/mean_loops_1']:.4f} at 1 loops" in out
    for step in (2, 4):
        flags = ["--checkpoint", str(run), "--step", str(step), "--modes", "core",
                 "--max_per_task", "4"]  # fmt: skip
        scores = evaluate.main(flags)["scores"]  # of the bundle that the run names
        for name, ours in (("mean", "CORE"), ("one", "core one"), ("two", "core two")):
            logged = [found[step][f"core/{name}_loops_{k}"] for k in (1, 2)]
            np.testing.assert_array_equal(logged, scores[ours])
    code, _, err = run_here(home, tmp_path / "plain", steps=5)
    losses = [[e["train/loss"] for e in entries(d) if "train/loss" in e]
              for d in (run, tmp_path / "plain")]  # fmt: skip
    assert code == 0 and losses[0] == losses[1], err


def test_a_missing_bundle_is_refused_before_any_compile(home, tmp_path):
    code, out, err = run_here(home, tmp_path / "run", "--config.train.core_every=2")
    assert code == 1 and "step compiled" not in out
    assert f"no CORE bundle at {home / 'cache' / 'eval_bundle'}" in err
    assert "`looped-jax download core`" in err and "data.core_bundle" in err
    assert not (tmp_path / "run" / "config.json").exists()


def test_examples_that_are_too_few_or_cannot_be_scored_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="no CORE bundle"):
        CoreEvaluation(config(), Letters(), None, loop_counts=(1,))
    write_bundle(tmp_path / "eval_bundle")  # where the download puts it
    CoreEvaluation(config(), Letters(), None, loop_counts=(1,))
    with pytest.raises(BundleError, match="use at least 2"):
        CoreEvaluation(config(core_examples=1), Letters(), None, loop_counts=(1,))

    class Joined(Letters):
        def encode(self, text):
            return [len(text)]

    with pytest.raises(PromptError, match="example 0"):
        CoreEvaluation(config(), Joined(), None, loop_counts=(1,))


def test_a_late_example_that_cannot_be_scored_is_told_and_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path))
    write_bundle(tmp_path / "eval_bundle")
    core = CoreEvaluation(config(), Letters(), None, loop_counts=(1,))
    monkeypatch.setattr("looped_jax.evaluation.scoring.SpanScorer", lambda *_, **__: None)

    def fails(*_, **__):
        raise PromptError("task one, example 3: no")

    monkeypatch.setattr("looped_jax.evaluation.core.evaluate_tasks", fails)
    result = core({}, 2)
    assert result.lines == ["CORE could not be scored: task one, example 3: no"]
    assert not result.scalars


def test_another_task_refuses_it():
    with pytest.raises(ConfigError, match="train.core_every=2: CORE is for text"):
        Task.evaluations(object(), config(), None, loop_counts=(1,))


def test_perplexity_is_of_the_targets_that_bits_per_byte_counts():
    token_bytes = np.array([0, 1, 3])  # the first is special
    counts = np.array([100, 2, 2])
    nats = np.array([0.5, 1.5, 2.0, 4.0])  # of the four that count, with 8 bytes
    bits = nats.sum() / np.log(2) / 8
    found = bits_per_byte.perplexity(bits, counts, token_bytes)
    np.testing.assert_allclose(found, np.exp(nats.mean()))
    assert bits_per_byte.perplexity(1e9, counts, token_bytes) == np.inf
    assert json.dumps(found)  # a plain float
