"""model.remat=auto with real compilers of devices that are short of memory."""

import dataclasses
import functools

import pytest

from looped_jax.config.options import Parts
from looped_jax.config.registry import PARTS
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


@pytest.mark.parametrize("target", ["v5e:1x1", "h100:1"])
def test_layers_around_the_loops_are_recomputed(target):
    """Outside of a scan a compiler may take what is computed again for what is there.

    A CPU's does.
    """
    mesh = programs.make_mesh((1, 1, 1), devices(target))

    @functools.cache
    def temporaries(remat, around):
        parts = Parts({name: PARTS[name].Settings(on=around) for name in ("prelude", "coda")})
        config = programs.make_config(remat=remat, loops=2, parts=parts)
        program = programs.compiled("train", config, mesh, rows=64, micro_batches=1)
        return program.memory_analysis().temp_size_in_bytes

    def added(remat):
        return temporaries(remat, True) - temporaries(remat, False)

    assert 0 < added("loop") < added("none") / 2  # which is what one of the two layers keeps
    assert temporaries("offload", True) < temporaries("none", True)
