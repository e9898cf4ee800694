"""The judge of exact answers, by hand-made hits and by a model's own logits."""

import jax
import numpy as np
import pytest

from looped_jax.config.settings import Settings
from looped_jax.evaluation import scoring
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.model import transformer
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.tasks.accuracy import Accuracy
from looped_jax.tasks.generated import Row
from tests.tasks.test_generated import task


def config_of(time, *, batch_size=2, loops=2):
    model = {"layers": 1, "loops": loops, "width": 32, "heads": 2, "seq_len": time}
    settings = Settings.from_dict(
        {"model": model | {"dtype": "float32"}, "train": {"batch_size": batch_size}}
    )
    return resolve(settings, vocab_size=99)


def loud(model):
    """Weights whose predictions differ from loop to loop."""
    params = transformer.init_params(model, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    return {
        name: weight + 0.4 * jax.random.normal(key, weight.shape)
        for key, (name, weight) in zip(keys, sorted(params.items()), strict=True)
    }


def test_an_answer_is_right_if_all_its_tokens_are(monkeypatch):
    nothing = np.zeros(5, np.int32)
    one = Row(nothing, np.array([-1, 1, 1, 1, 1]), np.array([-1, 3, 3, 5, 5]),
              np.array([-1, 0, 0, 1, 1]))  # fmt: skip
    other = Row(nothing, np.array([-1, -1, -1, 1, 1]), np.array([-1, -1, -1, 3, 5]))
    hits = np.zeros((2, 3, 5), bool)  # [loop counts, rows, T]
    hits[0, 0] = [0, 1, 0, 1, 1]  # of the first row half of one answer, and the other
    hits[1, 0] = [0, 1, 1, 1, 1]
    hits[1, 1] = [1, 1, 1, 1, 0]  # of the second one of two; what is not owed does not count
    hits[0, 2] = [1, 1, 1, 0, 1]  # of the third, as in training, one of two
    hits[1, 2] = [0, 0, 0, 1, 1]

    def scored(*_):
        batches = iter((hits[:, :2], np.pad(hits[:, 2:], ((0, 0), (0, 1), (0, 0)))))
        return lambda params, inputs, targets: next(batches)

    monkeypatch.setattr(scoring, "make_hit_step", scored)
    judge = Accuracy(
        config_of(5), sharding.one_device(), test=[one, other], trained=[other],
        loop_counts=(1, 2), difficulty="size",
    )  # fmt: skip
    scores = judge({})
    assert list(scores)[0] == "error_trained"
    assert scores == {
        "error_trained": {1: 0.5, 2: 0.0},
        "accuracy": {1: 0.25, 2: 0.75},
        "accuracy_trained": {1: 0.5, 2: 1.0},
        "accuracy_size_3": {1: 0.0, 2: 1.0},
        "accuracy_size_5": {1: 0.5, 2: 0.5},
    }
    line = judge.describe(scores)
    assert "0.2500 at 1, 0.7500 at 2" in line and "size 3: 1.00, 5: 0.50" in line


@pytest.mark.parametrize("name", ["hops", "steps"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_the_models_own_logits(name, batch_size):
    """Also beyond the trained loops, on any mesh, and with a target of each loop its own."""
    found, config = task(name, model={"loops": 2, "dtype": "float32"})
    config = resolve_batch(config, batch_size)
    params, counts = loud(config.model), (1, 2, 5)
    model = TrainedModel(config, params, None, step=0)
    test = found.validation_rows(test=True, loops=counts, most=config.train.eval_tokens)
    logits = model.logits(np.stack([row.inputs for row in test]), loops=counts)
    owed = np.stack([row.difficulty >= 0 for row in test])
    expected = {}
    for number, (k, of_loop) in enumerate(zip(counts, logits, strict=True)):
        targets = np.stack([np.broadcast_to(r.targets, (3, r.inputs.size))[number] for r in test])
        expected[k] = (np.asarray(of_loop).argmax(-1) == targets)[owed].mean()
    assert len(set(expected.values())) > 1
    for devices in (1, 4):
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        placed = jax.device_put(params, transformer.shardings(config.model, mesh))
        scores = found.judge(config, mesh, loop_counts=counts)(placed)
        assert scores["accuracy"] == pytest.approx(expected)


def resolve_batch(config, size):
    return resolve(
        Settings.from_dict(
            config.to_dict() | {"train": config.to_dict()["train"] | {"batch_size": size}}
        )
    )
