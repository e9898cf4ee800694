"""What the compilers of GPUs and TPUs make of whole models at their papers' sizes."""

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
LARGE = [name for name in FAMILIES if name not in ("nanogpt", "tinystories")]


def compiled(config, target, mesh):
    """The training step, and the names of its fused attention."""
    mesh = programs.make_mesh(MESHES[mesh], devices(target))
    count = micro_batches(config, devices=mesh.size)
    step = programs.compiled(
        "train", config, mesh, rows=config.train.batch_size, micro_batches=count
    )
    platform = mesh.devices.flat[0].platform
    return step, kernels(hlo.Program.read(step.as_text()), platform)


def at_scale(name):
    """Settings at its paper's sizes, the first of its presets."""
    return presets.make(name, next(iter(FAMILIES[name])))


@pytest.mark.parametrize("name", LARGE)
def test_the_papers_step_compiles_for_eight_gpus(name):
    settings = Settings.from_dict(at_scale(name))
    config = resolve(settings, vocab_size=settings.data.tokenizer_vocab_size)
    step, fused = compiled(config, "h100:8", "fsdp")
    assert any(BACKWARD.search(one) for one in fused)
    needed = step.memory_analysis()
    assert needed.temp_size_in_bytes + needed.argument_size_in_bytes < 80e9


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("target", ["h100:8", "v5e:2x4"])
def test_one_layer_of_each_kind_compiles_at_the_papers_width(target, name):
    """One before, in and after the loops, of a small vocabulary; all else is the paper's."""
    values = at_scale(name)
    values.model.layers = values.model.parts.prelude.layers = values.model.parts.coda.layers = 1
    values.optim.newton_schulz_steps = 1
    values.train.batch_size, values.train.steps = 1, 10
    values.train.tokens_per_step = 16 * values.model.seq_len
    values.train.scaled_from_layers = None
    _, fused = compiled(resolve(Settings.from_dict(values), vocab_size=2048), target, "fsdp")
    assert any(BACKWARD.search(one) for one in fused)
