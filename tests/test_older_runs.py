"""A run folder of an earlier version opens, continues to the same losses, and scores.

golden/run_at_1adf9ed.tar.gz: eight steps of a tiny model with the text it read, its checkpoint of
step 4, and the losses of all steps, written by the version of that commit.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

import looped_jax
from tests.programs import losses, run_here

ROOT = Path(__file__).parents[1]


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ROOT / "tests" / "golden" / "run_at_1adf9ed.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_it_opens(old):
    model = looped_jax.load(old / "run")
    assert model.step == 4 and model.config.model.parts.on() == ()
    assert model.logits("a loop", loops=(1, 2))[0].shape[-1] == 265
    assert len(model.generate(["a loop"], tokens=3)) == 1


def test_it_goes_on_to_the_same_losses(old):
    sizes = {
        "data.path": old / "text", "data.tokenizer_vocab_size": 265, "model.width": 16,
        "model.seq_len": 16, "train.tokens_per_step": 128, "train.batch_size": 4,
        "train.eval_every": 4, "train.eval_tokens": 64, "train.sample_tokens": 0,
        "data.shuffle_seed": None, "optim.warmdown_ratio": 0.2,  # as the preset had them then
    }  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in sizes.items()]
    code, out, err = run_here(old, old / "run", *overrides, steps=8)
    assert code == 0 and "from step 4" in out, err
    found = losses(old / "run")
    expected = json.loads((old / "expected.json").read_text())
    assert [*map(str, found)] == [*expected]
    for step, loss in expected.items():
        np.testing.assert_allclose(found[int(step)], loss, atol=1e-5)
