"""As little recomputation as the memory allows: asked of real compiled steps, with memory given."""

import dataclasses
import functools

import jax
import pytest

from looped_jax.planning import planner
from looped_jax.runtime import hardware
from looped_jax.training import recomputation, train_step
from tests.planning.test_plan import make_config as planned_config
from tests.training.test_train_step import TOKENS, make_config, make_optimizer, mesh_of


@functools.cache
def compiled(config):
    mesh = mesh_of(1, 1, 1)
    optimizer = make_optimizer(config, mesh)
    state = train_step.abstract(config, optimizer, mesh)
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
    return {
        False: train_step.make_train_step(config, optimizer, mesh).lower(state, tokens).compile()
    }


SMALL = {"layers": 1, "loops": 8, "width": 64}


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    """The CPU's compiler has no peak: arguments and temporaries, then."""
    monkeypatch.setattr(recomputation, "most_memory", lambda programs: max((
        p.memory_analysis().argument_size_in_bytes + p.memory_analysis().temp_size_in_bytes
        for p in programs
    ), default=0))  # fmt: skip


def held(remat):
    return recomputation.most_memory(compiled(make_config(remat=remat, **SMALL)).values())


def test_the_least_that_fits_is_taken_and_told():
    config = make_config(remat="auto", **SMALL)
    most, some, least = (held(remat) for remat in recomputation.ORDER)
    assert most > some > least
    for limit, remat, others in (
        (most / recomputation.USABLE + 2, "none", ""),
        (some / recomputation.USABLE + 2, "dots", "none would take"),
        (least / recomputation.USABLE + 2, "loop", "none would take"),
        (1, "loop", "dots would take"),  # nothing fits: what takes least
    ):
        found = recomputation.least(config, compiled, int(limit))
        assert found.config == make_config(remat=remat, **SMALL)
        assert found.programs is compiled(found.config)
        assert found.told.startswith(f"model.remat=auto: {remat}, ") and others in found.told


def test_a_compiler_that_is_out_of_memory_is_asked_for_less():
    def short(config):
        if config.model.remat != "loop":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 31.2G of 15.75G hbm")
        return compiled(config)

    config = make_config(remat="auto", **SMALL)
    found = recomputation.least(config, short, 2**40)
    assert found.config.model.remat == "loop" and "dots does not compile" in found.told

    def broken(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        recomputation.least(config, broken, 2**40)


def test_what_is_named_is_compiled_alone_and_devices_that_do_not_say_recompute(monkeypatch):
    named = recomputation.least(make_config(remat="dots", **SMALL), compiled, 1)
    assert named.config.model.remat == "dots" and named.told is None
    silent = recomputation.least(make_config(remat="auto", **SMALL), compiled)  # a CPU
    assert silent.config.model.remat == "dots" and "fastest on a CPU" in silent.told
    monkeypatch.setattr(jax, "default_backend", lambda: "plugin")
    silent = recomputation.least(make_config(remat="auto", **SMALL), compiled)
    assert silent.config.model.remat == "loop" and "no device says" in silent.told


def test_the_planner_counts_what_will_be_chosen():
    device, config = hardware.find("h100"), planned_config((1, 1, 1), remat="auto")
    assert planner.chosen(config, device).model.remat == "none"
    need = planner.count_memory(planner.changed(config, {"model.remat": "loop"}), device).total
    tight = dataclasses.replace(device, memory=need / planner.USABLE_MEMORY + 1)
    assert planner.chosen(config, tight).model.remat == "loop"
