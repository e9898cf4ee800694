"""What users register in files of their own is a setting like the others."""

import json
import os
import subprocess
import sys

import pytest

import looped_jax
from looped_jax.config.registry import LOOP_RULES, PARTS, Registry
from looped_jax.errors import CheckpointError
from tests import QUICK
from tests.programs import ROOT, flags

MINE = '''
import dataclasses
import jax.numpy as jnp
import optax
from looped_jax.config import presets
from looped_jax.model.loop_rules import LoopRule
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.base import Part, PartSettings
from looped_jax.model.weights import weight
from looped_jax.config.registry import LOOP_RULES, OBJECTIVES, OPTIMIZERS, PARTS
from looped_jax.model.objectives import Step
from looped_jax.training.optimizers import Optimizer


@dataclasses.dataclass(frozen=True)
class HalvesSettings:
    share: float = 0.5


@LOOP_RULES.register("halves")
class Halves(LoopRule):
    """Later loops start from a learned mix of embedding and state."""

    Settings = HalvesSettings

    def __init__(self, config, *, rngs):
        share = jnp.full((config.width,), config.rules["halves"].share)
        self.share = weight(share, "embed", group="vector")

    def start(self, here):
        mixed = here.e + self.share[...].astype(here.e.dtype) * (here.h - here.e)
        return rms_norm(jnp.where(here.first, here.e, mixed))


@dataclasses.dataclass(frozen=True)
class ScaleSettings(PartSettings):
    start: float = 1.0


@PARTS.register("mlp_scale")
class MLPScale(Part):
    Settings = ScaleSettings

    def __init__(self, settings, config, layer, *, rngs):
        self.scale = weight(jnp.full((config.width,), settings.start), "embed", group="vector")

    def mlp_output(self, x, here):
        return x * self.scale[...].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class FadingSettings:
    factor: float = 0.5


@OBJECTIVES.register("fading")
class Fading(Step):
    """Every loop, earlier ones less by a factor."""

    Settings = FadingSettings

    def total(self, config, nats):
        shares = config.objectives["fading"].factor ** jnp.arange(len(nats))[::-1]
        return (nats * shares / shares.sum()).sum()


@dataclasses.dataclass(frozen=True)
class SignSettings:
    learning_rate: float = 0.001


@OPTIMIZERS.register("sign")
class Sign(Optimizer):
    """A step of the same size for every weight."""

    Settings = SignSettings

    def transformation(self, config, weights, run, mesh=None):
        rate = config.optimizers["sign"].learning_rate
        return optax.sign_sgd(lambda step: rate * run.multiplier(step))


def get_config(preset=None):
    return presets.make("halves", preset)
'''
# Runs that leave classes behind in their process, and the last of them opened.
RUNS = """
import json, sys
import looped_jax
from looped_jax import train
for flags in json.loads(sys.argv[1]):
    try:
        train.main(flags)
    except SystemExit as stopped:
        print("code", stopped.code)
m = looped_jax.load(sys.argv[2])
assert m.config.model.parts["mlp_scale"].start == 0.5
print(sorted(n for n in m.params if "share" in n or "scale" in n))
"""


def test_what_is_of_ones_own_trains_and_opens_again(home, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    run = tmp_path / "run"
    overrides = (
        "--config.model.parts.mlp_scale.on=True", "--config.model.parts.mlp_scale.start=0.5",
        "--config.model.rules.halves.share=0.25", "--config.model.loss=fading",
        "--config.model.objectives.fading.factor=0.75", "--config.optim.optimizer=sign",
        "--config.optim.optimizers.sign.learning_rate=0.01", "--config.optim.warmdown_ratio=0.2",
    )  # fmt: skip
    other = [o.replace("0.25", "0.3") for o in overrides]
    runs = [
        flags(home, run, settings, steps, config=f"{tmp_path / 'mine.py'}:tiny")
        for settings, steps in ((overrides, 4), (overrides, 5), (other, 5))
    ]
    environment = {**os.environ, "LOOPED_JAX_CACHE": str(home / "cache"), "XLA_FLAGS": QUICK}
    done = subprocess.run(
        [sys.executable, "-c", RUNS, json.dumps(runs), str(run)], cwd=ROOT, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in (
        "model.variant = 'halves'", "model.parts.mlp_scale.start = 0.5",
        "model.rules.halves.share = 0.25", "model.objectives.fading.factor = 0.75",
        "optim.optimizer = 'sign'", "optim.optimizers.sign.learning_rate = 0.01",
        f"continuing {run} from step 4",
    ):  # fmt: skip
        assert line in done.stdout
    assert done.stdout.count("code 1") == done.stdout.count("code ") == 1  # of the third
    assert "model.rules.halves.share: 0.25 there, 0.3 here" in done.stderr
    assert "['blocks.0.parts.mlp_scale.scale', 'rule.share']" in done.stdout
    program = [sys.executable, "-m", "looped_jax.generate", "--checkpoint", str(run)]
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    done = subprocess.run(
        [*program, "--tokens=2", "--import=mine"], cwd=ROOT, env=environment | {"PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "--- 1 of 1" in done.stdout, done.stderr
    with pytest.raises(CheckpointError, match="mlp_scale is no setting.*of your own first"):
        looped_jax.load(run)


def test_names_are_given_once():
    registry = Registry("thing", "looped_jax.config.registry")

    class One:
        pass

    class Two:
        pass

    registry.register("one")(One)
    registry.register("one")(One)  # a notebook's cell, run again
    with pytest.raises(ValueError, match="there is a thing 'one' already"):
        registry.register("one")(Two)
    assert list(registry) == ["one"] and registry["one"] is One


def test_what_comes_with_the_package_is_there_without_importing_the_model_first():
    program = (
        "from looped_jax.config.registry import LOOP_RULES, PARTS\n"
        "print(list(LOOP_RULES), list(PARTS))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == f"{list(LOOP_RULES)} {list(PARTS)}"
