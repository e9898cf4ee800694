"""The planner against the program that is really compiled and the state that is really made."""

import collections
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax import plan
from looped_jax.config import presets
from looped_jax.config.options import Parts
from looped_jax.config.registry import PARTS
from looped_jax.config.settings import (
    LoopSamplingConfig,
    MeshConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
)
from looped_jax.errors import ConfigError
from looped_jax.model import flops
from looped_jax.planning import collectives, memory, planner, step_time
from looped_jax.planning.table import describe
from looped_jax.resolve import resolve
from looped_jax.runtime import hardware
from looped_jax.training import optimizers, train_step

H100 = hardware.find("h100")
ROOT = Path(__file__).parents[2]
AROUND = Parts({name: PARTS[name].Settings(on=True) for name in ("prelude", "coda")})


def make_config(mesh=(2, 4, 1), rows=4, micro_batches=1, **model):
    settings = {"layers": 1, "loops": 3, "width": 64, "heads": 2, "seq_len": 64} | model
    training = TrainSettings(
        steps=100,
        batch_size=rows,
        tokens_per_step=rows * micro_batches * mesh[0] * mesh[1] * settings["seq_len"],
    )
    return resolve(
        Settings(
            model=ModelSettings(**{"dtype": "float32", **settings}),
            optim=OptimConfig(newton_schulz_dtype="float32"),
            mesh=MeshConfig(*mesh),
            train=training,
        ),
        vocab_size=97,
    )


@pytest.fixture(scope="module")
def planned():
    # so slow a device is bound by compute, small as the model is
    return planner.make(make_config(), H100, efficiency=0.001, remats=("loop", "dots"))


def compiled(config):
    """The step for this machine, with XLA's attention."""
    config = planner.changed(config, {"model.kernel": "xla"})
    traced = planner.trace_step(config, planner.mesh_of(config))
    # It is never run: level 0 halves compile time, with the same memory and the same collectives.
    return traced.lower().compile(compiler_options={"xla_backend_optimization_level": "0"})


def sent_by(config, *axes):
    """What the compiled step sends, beside a few numbers."""
    found = collectives.read(compiled(config), planner.mesh_of(config))
    return [c for c in found if c.bytes_sent > 1000 and (not axes or c.axes == axes)]


def test_state_bytes_are_those_of_a_real_state_and_of_the_compiled_arguments(planned):
    mesh = planner.mesh_of(planned.config)
    optimizer, _ = planner.abstract_state(planned.config, mesh)
    current = train_step.create(planned.config, optimizer, mesh)

    def held(tree):
        return sum(leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(tree))

    counted = planned.requested.memory
    assert counted.parameters == held(current.params)
    assert counted.optimizer == held(current.optimizer)
    step, tokens = 4, 4 * 4 * 65  # int32
    found = compiled(planned.config).memory_analysis().argument_size_in_bytes
    assert found == counted.parameters + counted.optimizer + step + tokens


@pytest.mark.parametrize("remat", planner.PLANNED_REMATS)
def test_counted_memory_is_near_the_compiled(remat):
    """In float32 and with XLA's attention, where the CPU compiler holds what is counted. Of the K
    loops kept it takes one out to work on, which is not counted: hence many loops."""
    config = make_config((1, 1, 1), loops=12, width=128, seq_len=128, remat=remat)
    choice = planner.estimate_cost(config, H100, 0.45)
    found = compiled(config).memory_analysis()
    held = found.argument_size_in_bytes + found.temp_size_in_bytes
    assert choice.memory_xla.total == pytest.approx(held, rel=0.1)
    assert choice.kernel == "xla"  # cuDNN does not compute in float32


def test_a_fused_kernel_saves_less_and_only_where_attention_is_saved():
    for remat, saved in (("none", True), ("loop", False)):
        config = make_config(dtype="bfloat16", remat=remat)
        fused = planner.count_memory(config, H100)
        plain = planner.count_memory(config, H100, kernel="xla")
        assert (fused.saved_activations < plain.saved_activations) == saved
        assert fused.total < plain.total


def test_layers_that_gather_hold_one_of_them_whole_and_send_it_in_every_loop():
    model = {"dtype": "bfloat16", "layers": 4, "variant": "LT", "gather": "layer"}
    config = make_config(micro_batches=2, **model)
    choice = planner.estimate_cost(config, H100, 0.45)
    layer, outside = 12 * 64**2, 2 * 128 * 64
    weights = 4 * layer + outside
    assert choice.memory.weights == 2 * (layer + outside)
    assert choice.memory.gradients == 4 * (2 * weights // 4 + layer)
    over = {(c.kind, c.axes): 0 for c in choice.collectives}
    for c in choice.collectives:
        if c.purpose != "optimizer":
            over[c.kind, c.axes] += c.bytes_sent
    visits = 2 * 3 * 4  # micro-batches, loops, layers
    gathered = visits * 3 * layer + 2 * outside  # forward, recomputed and backward, in bfloat16
    assert over["all-gather", ("fsdp",)] == 2 * gathered * 3 // 4
    scattered = visits * layer + 2 * outside
    assert over["reduce-scatter", ("fsdp",)] == 4 * scattered * 3 // 4


@pytest.mark.parametrize(
    ("preset", "device", "mesh", "entries", "most"),
    [
        ("1b", "h100", (8, 8, 1), 65_536, 30), ("3b", "h100", (8, 8, 1), 65_536, 60),
        ("3b", "tpu-v5p", (8, 8, 1), 65_536, 60), ("24gb", "rtx4090", (1, 1, 1), 32_768, 20),
    ],
)  # fmt: skip
def test_large_presets_fit_by_arithmetic(monkeypatch, preset, device, mesh, entries, most):
    config = resolve(Settings.from_dict(presets.make("FLT", preset)), vocab_size=entries)
    config = dataclasses.replace(config, mesh=MeshConfig(*mesh))
    sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    monkeypatch.setattr(
        planner, "mesh_of", lambda _: jax.sharding.AbstractMesh(tuple(mesh), tuple(sizes))
    )
    chosen = hardware.find(device)
    needed = planner.count_memory(config, chosen).total
    assert needed < min(planner.USABLE_MEMORY * chosen.memory, most * 2**30)


def test_collectives_follow_from_the_shards_and_do_not_grow_with_loops(planned):
    counted = flops.count(planned.config.model)
    found = {(c.purpose, c.kind, c.axes): c.bytes_sent for c in planned.requested.collectives}
    weights = 4 * counted.parameters
    assert found["weights", "all-gather", ("fsdp",)] == weights * 3 // 4
    assert found["gradients", "reduce-scatter", ("fsdp",)] == weights * 3 // 4
    assert found["gradients", "all-reduce", ("data",)] == weights // 4
    large = [c for c in planned.requested.collectives if c.bytes_sent > 1000]
    # One call may carry several weights.
    assert large == [dataclasses.replace(c, calls=own.calls) for c, own in zip(
        sent_by(make_config(loops=12)), large, strict=True
    )]  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [
        {"remat": "loop"},
        {"remat": "dots", "variant": "LT"},
        {"remat": "none", "heads": 4, "kv_heads": 2, "loss": "STEP"},
        {"remat": "loop", "attention": "mla", "latent_rank": 16},
        {"parts": AROUND},
        {"parts": AROUND, "remat": "none"},
    ],
    ids=str,
)
def test_what_the_tensor_axis_sends_is_near_what_the_compiler_adds(model):
    config = make_config((1, 1, 2), layers=2, micro_batches=2, **model)
    counted = [c for c in planner.communicated(config) if c.axes == ("tensor",)]
    found = sent_by(config, "tensor")
    assert sum(c.bytes_sent for c in counted) == pytest.approx(
        sum(c.bytes_sent for c in found), rel=0.1
    )


def test_weights_that_the_tensor_axis_cuts_travel_as_the_compiler_lets_them():
    config = make_config((2, 2, 2), rows=2)

    def by_axes(found):
        sent = collections.Counter()
        for c in found:  # newer compilers do not say what a gather over tensor is for
            if c.purpose in ("weights", "gradients", "other") and c.bytes_sent > 1000:
                sent[c.kind, c.axes] += c.bytes_sent
        return sent

    counted, found = by_axes(planner.communicated(config)), by_axes(sent_by(config))
    assert len(found) == 4 and counted == pytest.approx(found, rel=0.01)


def test_what_a_coda_saves_is_not_counted_again_for_every_scored_loop():
    def traffic(loss):
        config = make_config(
            (1, 1, 1), loops=8, loss=loss, parts=Parts({"coda": PARTS["coda"].Settings(on=True)})
        )
        return step_time.work(config, {"data": 1, "fsdp": 1, "tensor": 1}, micro_batches=1,
                              kernel="xla").traffic  # fmt: skip

    assert traffic("STEP") == traffic("END")


@pytest.mark.parametrize("around", [{}, {"parts": AROUND}], ids=["", "prelude and coda"])
def test_what_attention_saves_is_cut_over_the_tensor_axis(around):
    """Heads and hidden units of every layer are, and they are most of what is saved."""
    sizes = {"layers": 2, "loops": 4, "width": 96, "heads": 8, "seq_len": 256, "remat": "none"}
    model = make_config((1, 1, 1), dtype="bfloat16", **sizes, **around).model
    for kernel in ("xla", "cudnn"):
        whole, half = (memory.saved_residuals(model, 4, kernel, tensor) for tensor in (1, 2))
        assert half < 0.72 * whole


def test_layers_that_run_once_are_worked_on_once():
    """Eight layers in loops, four around them: half as much again of what layers do."""

    def work(remat, loops=8, **around):
        config = make_config((1, 1, 1), loops=loops, variant="LT", remat=remat, **around)
        mesh = {"data": 1, "fsdp": 1, "tensor": 1}
        return step_time.work(config, mesh, micro_batches=1, kernel="xla")

    for remat in ("dots", "loop"):
        assert work(remat, parts=AROUND).recomputed == pytest.approx(1.5 * work(remat).recomputed)
    added = [work("none", k, parts=AROUND).traffic - work("none", k).traffic for k in (2, 8)]
    assert added[0] == added[1] > 0


def test_flops_agree_with_the_compiler():
    """XLA counts a scan body once: one loop, one micro-batch. It also counts norms, softmax, RoPE
    and the rounding of types, which flops.count leaves out and which shrink with the width."""
    config = make_config((1, 1, 1), loops=1, width=256, remat="none")
    mesh = planner.mesh_of(config)
    gradients = jax.jit(functools.partial(train_step.gradients, config, mesh))
    _, shapes = planner.abstract_state(config, mesh)
    tokens = jax.ShapeDtypeStruct((1, 4, 65), jnp.int32)
    compiled = gradients.lower(shapes.params, tokens).compile().cost_analysis()["flops"]
    work = step_time.work(config, mesh.shape, micro_batches=1, kernel="xla")
    assert work.model == flops.count(config.model).flops * 4 * 64 and work.recomputed == 0
    assert compiled == pytest.approx(work.model, rel=0.05)


def test_newton_schulz_flops_agree_with_the_compiler():
    config = make_config((1, 1, 1), width=128)
    together = jax.ShapeDtypeStruct((2, 128, 512), jnp.float32)
    square = jax.ShapeDtypeStruct((4, 128, 128), jnp.float32)
    compiled = sum(
        jax.jit(lambda x: optimizers.orthogonalize(x, 5))
        .lower(x)
        .compile()
        .cost_analysis()["flops"]
        for x in (together, square)
    )
    layers = config.model.layers
    assert compiled * layers == pytest.approx(step_time.newton_schulz_flops(config), rel=0.05)
    assert step_time.newton_schulz_flops(config, devices=1000) == 5 * sum(
        4 * 128**2 * long + 2 * 128**3 for long in (128, 512)
    )


def test_links_by_where_the_axes_lie():
    mesh = {"data": 8, "fsdp": 16, "tensor": 2}

    def rate(kind, *axes):
        devices = int(np.prod([mesh[axis] for axis in axes]))
        collective = collectives.Collective(kind, axes, devices, "weights", 1, 1)
        return step_time.rate(collective, mesh, H100)

    assert rate("all-reduce", "tensor") == 450e9
    assert rate("all-gather", "fsdp") == 4 * 50e9  # four of its sixteen are in one node
    assert rate("all-to-all", "fsdp") == 50e9
    assert rate("all-reduce", "data") == 50e9


def test_a_run_that_does_not_fit_is_told_what_to_change(planned):
    config = planner.changed(planned.config, {"model.remat": "none"})
    need = planner.count_memory(config, H100).total
    small = dataclasses.replace(H100, memory=0.8 * need / planner.USABLE_MEMORY)
    found = planner.make(config, small, remats=())
    assert not found.fits(found.requested) and found.fits(found.recommended)
    assert found.changes == {"train.batch_size": found.recommended.config.train.batch_size}
    assert found.recommended.config.train.tokens_per_step == config.train.tokens_per_step
    assert found.recommended.micro_batches == 4 // found.recommended.config.train.batch_size
    text = describe(found)
    assert "DOES NOT FIT" in text and "Change: --config.train.batch_size=" in text
    tiny = dataclasses.replace(H100, memory=10_000)
    hopeless = planner.make(config, tiny, remats=())
    assert hopeless.recommended is None and "use more or larger devices" in describe(hopeless)


def test_layers_gather_where_no_device_holds_all_weights():
    config = make_config((1, 4, 1), layers=4, width=256)

    def least(gather):
        chosen = planner.changed(config, {"model.gather": gather, "train.batch_size": 1})
        return planner.count_memory(chosen, H100).total

    between = (least("step") + least("layer")) / 2
    small = dataclasses.replace(H100, memory=between / planner.USABLE_MEMORY)
    found = planner.make(config, small, remats=())
    assert found.changes["model.gather"] == "layer" and found.fits(found.recommended)
    sent = [
        sum(c.bytes_sent for c in one.collectives) for one in (found.requested, found.recommended)
    ]
    assert sent[1] > 2 * sent[0]
    assert "--config.model.gather=layer" in describe(found)
    # Where nothing is cut there is nothing to gather.
    whole = list(planner.fit_candidates(make_config((1, 1, 1))))
    assert not any("model.gather" in changes for changes in whole)
    assert len({tuple(changes.items()) for changes in whole}) == len(whole)


def test_the_table_names_what_slows_a_run_down(planned):
    slow = dataclasses.replace(planned.hardware, network=1e3, per_node=1)
    times = {
        remat: dataclasses.replace(
            choice,
            time=step_time.estimate(
                choice.work, choice.collectives, {"data": 2, "fsdp": 4, "tensor": 1}, slow,
                efficiency=1,
            ),
        )
        for remat, choice in planned.choices.items()
    }  # fmt: skip
    text = " ".join(describe(dataclasses.replace(planned, hardware=slow, choices=times)).split())
    assert "Bound by the network" in text and "keep mesh.fsdp within a node, at most 1" in text


def test_a_run_that_fits_is_told_what_would_be_faster(planned):
    assert planned.fits(planned.requested) and planned.config.model.remat == "loop"
    assert planned.changes == {"model.remat": "dots"}
    assert planned.recommended.time.total < planned.requested.time.total
    text = describe(planned)
    assert "Verdict: fits" in text and "Change: --config.model.remat=dots" in text
    assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) <= 60


def test_a_batch_that_does_not_divide_is_replaced_with_a_warning():
    config = planner.changed(make_config(), {"train.batch_size": 3})
    found, (warning,) = planner.with_possible_batch(config)
    assert found.train.batch_size == 2
    assert "is no multiple of train.batch_size 3" in warning
    config = planner.changed(config, {"train.tokens_per_step": 100})
    with pytest.raises(ConfigError, match="train.tokens_per_step=100 is no multiple"):
        planner.with_possible_batch(config)


def test_what_cannot_be_planned_is_refused():
    config = planner.changed(make_config(), {"model.remat": "offload"})
    with pytest.raises(ConfigError, match="plan with one of loop, dots, none"):
        planner.make(config, H100)
    drawn = LoopSamplingConfig("poisson", backward_loops=1, curriculum="linear")
    config = planner.changed(make_config(), {"train.loop_sampling": drawn})
    with pytest.raises(ConfigError, match="distribution=fixed, backward_loops=None and curricul"):
        planner.make(config, H100)


def test_the_vocabulary_is_that_of_what_is_learned():
    for preset, entries in (("tiny", 4096), ("hops", 8 + 4 * 8 + 8 * 8)):
        assert plan.vocabulary(Settings.from_dict(presets.make("FLT", preset))) == entries


def test_meshes_on_the_command_line():
    assert plan.parse_mesh("fsdp=8,data=64") == MeshConfig(data=64, fsdp=8, tensor=1)
    for wrong in ("data", "model=2", "data=0", "data=-2", ""):
        with pytest.raises(ConfigError, match="is no axis and size; give data, fsdp, tensor"):
            plan.parse_mesh(wrong)

    with pytest.raises(ConfigError, match="more than one axis open"):
        plan.parse_mesh("data=-1,fsdp=-1")


def run(*args):
    command = [sys.executable, "-m", "looped_jax.plan", "--config", "configs/flt.py:tiny", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})


def test_the_program_plans_for_more_devices_than_there_are(tmp_path):
    out = tmp_path / "plan.json"
    small = [
        "--config.model.layers=1",
        "--config.model.width=32",
        "--config.model.seq_len=32",
        "--config.train.batch_size=8",
    ]
    done = run("--mesh=data=4,fsdp=4", "--hardware=tpu-v5p", f"--out={out}", *small)
    assert done.returncode == 0, done.stderr
    assert "16 tpu-v5p" in done.stdout and "Verdict: fits" in done.stdout
    record = json.loads(out.read_text())
    assert record["choices"]["loop"]["micro_batches"] == 1
    assert record["hardware"]["name"] == "tpu-v5p"
    # the keys of files stay while fields get other names
    assert {"kept", "weights"} < record["choices"]["loop"]["memory"].keys() and "better" in record
    assert all("sent" in one for one in record["choices"]["loop"]["collectives"])


def test_the_program_says_what_is_missing_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--config=flt:tiny", "--hardware=h100"])
    said = capsys.readouterr()
    assert stopped.value.code == 1 and not said.out
    assert said.err == "error: mesh.data=-1 leaves open how many devices; as --mesh data=8,fsdp=8\n"
