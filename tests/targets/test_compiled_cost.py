"""What is read from real compiled steps: every kernel is known, and every part has its costs."""

import re

import pytest

from looped_jax.planning import compiled_cost, hlo
from looped_jax.runtime import hardware
from tests.targets import programs
from tests.targets.devices import devices

pytestmark = pytest.mark.targets
AGAIN = re.compile(r"rematted_computation.*[/(]head[/)]")


@pytest.mark.parametrize(
    ("target", "device", "kernels"),
    [("h100:8", "h100", {"dot_product_attention"}), ("v5e:2x4", "tpu-v5e", {"splash_mha"})],
)
def test_every_part_of_a_real_step_has_its_costs(target, device, kernels):
    config = programs.make_config(loops=3, loss_chunk=128, window_pattern="SL", layers=2)
    mesh = programs.make_mesh((8, 1, 1), devices(target))
    compiled = programs.compiled("train", config, mesh)
    cost = compiled_cost.read(compiled, mesh, hardware.find(device), config.model)
    idle = [name for name, part in cost.parts.items() if not part.seconds]
    assert not idle
    assert {name[: len(kernel)] for name in cost.custom_calls for kernel in kernels} >= kernels
    assert cost.parts["attention kernels"].charged == cost.parts["attention kernels"].seconds
    of_gpu = device == "h100"
    assert bool(cost.parts["head and loss"].charged) == of_gpu  # a TPU's compiler estimates it
    assert cost.memory > cost.temporaries > 0
    # the backward pass computes no logits again
    assert not [i for _, i in hlo.Program.read(compiled.as_text()) if AGAIN.search(i.scope)]
