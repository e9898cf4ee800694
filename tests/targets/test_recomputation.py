"""model.remat=auto with real compilers of devices that are short of memory."""

import dataclasses

import pytest

from looped_jax.training import recomputation
from tests.targets import programs
from tests.targets.devices import devices

pytestmark = pytest.mark.targets


@pytest.mark.parametrize(("target", "rows"), [("v5e:1x1", 512), ("h100:1", 2560)])
def test_rows_that_do_not_fit_are_recomputed(target, rows):
    """A TPU's compiler refuses what its memory does not hold, a GPU's says how much it would be."""
    mesh = programs.make_mesh((1, 1, 1), devices(target))
    config = programs.make_config(remat="auto", loops=24)

    def compiled(config):
        return {False: programs.compiled("train", config, mesh, rows=rows, micro_batches=1)}

    limit = {"v5e:1x1": 15.75 * recomputation.GIB, "h100:1": 0.75 * 79.1 * recomputation.GIB}[
        target
    ]
    found = recomputation.least(config, compiled, int(limit))
    assert found.config.model.remat in ("dots", "loop")
    assert found.told.startswith("model.remat=auto: ") and "none " in found.told
    held = recomputation.most_memory(found.programs.values())
    assert 0 < held <= recomputation.USABLE * limit
    named = dataclasses.replace(config.model, remat=found.config.model.remat)
    assert found.config == dataclasses.replace(config, model=named)
