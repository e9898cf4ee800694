"""model.gather="layer" in compiled programs: gathers stay in the loops, and memory falls."""

from collections import defaultdict

import pytest

from looped_jax.planning import collectives
from tests.targets import programs
from tests.targets.devices import devices

pytestmark = pytest.mark.targets

MATRICES = 2 * 12 * 512**2  # numbers of the looped layers
VISITS = 2 * 4  # micro-batches and loops
OF_RING = 7 / 8


def compiled(target, gather, **model):
    """Temporary bytes, and what fsdp sends by kind and by the loops around it."""
    settings = {"layers": 2, "width": 512, "heads": 4, "loops": 4} | model
    config = programs.make_config(gather=gather, **settings)
    mesh = programs.make_mesh((1, 8, 1), devices(target))
    program = programs.compiled("train", config, mesh)
    sent = defaultdict(int)
    for one in collectives.read(program, mesh):
        sent[one.kind, one.depth] += one.bytes_sent
    return program.memory_analysis().temp_size_in_bytes, sent


@pytest.mark.parametrize("target", ["h100:8", "v5e:2x4"])
def test_gathers_and_scatters_stay_in_the_loops_and_memory_falls(target):
    held, sent = compiled(target, "layer")
    gathered, scattered = (VISITS * MATRICES * size * OF_RING for size in (2, 4))
    # Forward, recomputed and backward, less what a loop has alike or need not compute again.
    assert 2.8 * gathered < sent["all-gather", 2] <= 3 * gathered
    assert sent["reduce-scatter", 2] == pytest.approx(scattered)
    outside = 2 * 2 * 4096 * 512 * OF_RING  # embedding and head, of each micro-batch
    alike = 2 * 2 * 512**2 * OF_RING  # FLT's first layer has the same keys and values in each loop
    assert sent["all-gather", 1] == pytest.approx(2 * (outside + alike))
    assert sent["reduce-scatter", 1] == pytest.approx(4 * outside)
    assert not sent["all-gather", 0] and not sent["reduce-scatter", 0]

    whole, once = compiled(target, "step")
    assert not once["all-gather", 1] and not once["all-gather", 2]
    assert held < 0.6 * whole


@pytest.mark.parametrize("target", ["h100:8", "v5e:2x4"])
def test_pieces_that_fill_no_tiles_are_scattered_too(target):
    """Of 160 numbers here: the TPU's compiler would sum matrices whole, for twice the bytes."""
    _, sent = compiled(target, "layer", layers=1, width=1280, heads=10, loops=2)
    scattered = 2 * 2 * 12 * 1280**2 * 4 * OF_RING
    assert sent["reduce-scatter", 2] == pytest.approx(scattered)
    assert not sent["all-reduce", 2]
