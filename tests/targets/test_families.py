"""What the compilers of GPUs and TPUs make of whole models at their papers' sizes."""

import dataclasses

import pytest

from looped_jax.config import presets
from looped_jax.config.families import FAMILIES
from looped_jax.config.resolved import micro_batches
from looped_jax.config.settings import Settings
from looped_jax.planning import hlo
from looped_jax.resolve import resolve
from tests.targets import programs
from tests.targets.devices import devices
from tests.targets.test_programs import BACKWARD, MESHES, kernels

pytestmark = pytest.mark.targets


def compiled(config, target, mesh):
    """The training step, and the names of its fused attention."""
    mesh = programs.make_mesh(MESHES[mesh], devices(target))
    count = micro_batches(config, devices=mesh.size)
    step = programs.compiled(
        "train", config, mesh, rows=config.train.batch_size, micro_batches=count
    )
    platform = mesh.devices.flat[0].platform
    return step, kernels(hlo.Program.read(step.as_text()), platform)


def settings_of(name):
    return Settings.from_dict(presets.make(name, "paper"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_papers_step_compiles_for_eight_gpus(name):
    settings = settings_of(name)
    config = resolve(settings, vocab_size=settings.data.tokenizer_vocab_size)
    step, fused = compiled(config, "h100:8", "fsdp")
    assert any(BACKWARD.search(one) for one in fused)
    needed = step.memory_analysis()
    assert needed.temp_size_in_bytes + needed.argument_size_in_bytes < 80e9


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("target", ["h100:8", "v5e:2x4"])
def test_one_layer_of_each_kind_compiles_at_the_papers_width(target, name):
    """With one layer before, in and after the loops, and few words: what its gradients need fits."""
    settings = settings_of(name)
    parts = settings.model.parts
    single = {n: dataclasses.replace(parts[n], layers=1) for n in ("prelude", "coda")}
    model = dataclasses.replace(
        settings.model, layers=1, parts=type(parts)({n: parts[n] for n in parts} | single)
    )
    optim = dataclasses.replace(settings.optim, newton_schulz_steps=1)
    train = dataclasses.replace(settings.train, steps=10, tokens_per_step=2 * 8 * model.seq_len)
    settings = dataclasses.replace(settings, model=model, optim=optim, train=train)
    train = dataclasses.replace(settings.train, batch_size=1)
    config = resolve(dataclasses.replace(settings, train=train), vocab_size=2048)
    _, fused = compiled(config, target, "fsdp")
    assert any(BACKWARD.search(one) for one in fused)
