"""What the compilers of GPUs and TPUs make of every program: it compiles, fused, and talks little.

Two tables hold every pair of features at least once. Each row of training is compiled with one loop
and with twelve, the others with twelve. The compilers are XLA's own, the devices are not here.
"""

import dataclasses
import re

import pytest

from configs import base
from looped_jax.config.options import Parts
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import micro_batches
from looped_jax.config.settings import LoopSamplingConfig, Settings
from looped_jax.planning import collectives, hlo
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from tests.covering import every_pair
from tests.targets import programs
from tests.targets.devices import devices

pytestmark = pytest.mark.targets

FUSED = {"gpu": "__cudnn$fmha", "tpu": "tpu_custom_call"}
BACKWARD = re.compile(r"SoftmaxBackward|splash_\w*_d(q|kv)")
MESHES = {
    "one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "data-fsdp": (2, 4, 1),
    "tensor": (2, 2, 2),
}  # fmt: skip
ATTENTION = {
    "full": {},
    "gqa": {"width": 512, "heads": 4, "kv_heads": 2},
    "mla": {"attention": "mla"},
}
RULES = ("FLT", "FLT_res", "LT_ia", "LT_i", "LT")
# Rows of training are never shorter than a window; those of answers and prompts may be.
WINDOWS = {
    "open": {}, "window": {"window_pattern": "SL", "layers": 2},
    "wide": {"window_pattern": "SL", "layers": 2, "seq_len": 1024},
}  # fmt: skip
TRAINING = {
    "program": ("train", "diagnostics", "lr_find"),
    "mesh": tuple(MESHES),
    "rule": RULES,
    "remat": ("loop", "offload", "dots", "none"),
    "attention": tuple(ATTENTION),
    "loss": ("END", "FEW", "STEP"),
    "window": ("open", "window"),
}
OTHERS = {
    "program": ("score", "span", "measure", "prefill", "decode"),
    "mesh": tuple(MESHES),
    "rule": RULES,
    "attention": tuple(ATTENTION),
    "window": tuple(WINDOWS),
}


def check(target, sizes, program, loops, *, time=None, fused=True, **model):
    """Compile, look at what came out, and return what batch devices send each other."""
    config = programs.make_config(loops=loops, **model)
    mesh = programs.make_mesh(sizes, devices(target))
    compiled = programs.compiled(program, config, mesh, time=time)
    parsed = hlo.Program.read(compiled.as_text())
    found = kernels(parsed, mesh.devices.flat[0].platform)
    if program == "decode" or not fused:  # one query per row: nothing to fuse
        assert not found
    elif program in TRAINING["program"]:
        assert any(BACKWARD.search(name) for name in found), "attention's gradient is not fused"
    assert found or not fused or program == "decode", "attention is not fused"
    assert not float32_products(parsed), "float32 operands in a bfloat16 loop"
    sent = collectives.read(compiled, mesh, unknown_loops=True)
    sent = [c for c in sent if c.axes != ("tensor",)]
    assert not [c for c in sent if c.depth], "batch devices talk inside a loop"
    large = [
        c.kind for c in sent if c.bytes_sent > 2**16
    ]  # what the reader misses would pass unseen
    if program in TRAINING["program"] and sharding.batch_devices(mesh) > 1:
        assert {"all-reduce", "reduce-scatter"} & set(large), "gradients are not reduced"
    if mesh.shape["fsdp"] > 1 and program not in ("prefill", "decode"):
        assert "all-gather" in large, "weights are not gathered"
    return sent


def check_training(target, sizes, program="train", **model):
    one, twelve = (check(target, sizes, program, loops, **model) for loops in (1, 12))
    bytes_of = [{(c.kind, c.axes, c.purpose): c.bytes_sent for c in sent} for sent in (one, twelve)]
    assert bytes_of[0].keys() == bytes_of[1].keys()
    for kind, sent in bytes_of[0].items():  # metrics hold a few numbers of every loop
        assert abs(bytes_of[1][kind] - sent) < 8192, kind


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("target, of_a_loop", [("h100:8", 3), ("v5e:2x4", 4)])
def test_every_micro_batch_is_computed_once(target, of_a_loop, micro_batches):
    """Attention's kernels: forward, again for the backward pass, and of that one, or a TPU's two.

    Of a scan over one micro-batch the TPU's compiler made two of all loops, one after the other.
    """
    config, mesh = programs.make_config(), programs.make_mesh((8, 1, 1), devices(target))
    compiled = programs.compiled("train", config, mesh, micro_batches=micro_batches)
    parsed = hlo.Program.read(compiled.as_text())
    of_attention = FUSED[mesh.devices.flat[0].platform]
    runs = sum(
        parsed.runs(computation)
        for computation, i in parsed
        if i.target.startswith(of_attention) and "attention" in i.scope + i.name
    )
    assert runs == micro_batches * config.model.loops * of_a_loop


def kernels(parsed, platform):
    """Fused attention in the program, by name."""
    return [
        f"{i.name} {i.target}"
        for _, i in parsed
        if i.opcode == "custom-call"
        and i.target.startswith(FUSED[platform])
        and (platform == "gpu" or "splash" in i.name)
    ]


def float32_products(parsed):
    """Products inside of loops that are given float32, by their place in the model.

    Left out: means that a norm takes by a TPU's matrix unit, which are of float32 as everywhere.
    """
    return sorted(
        {
            i.scope
            for computation, i in parsed
            if "/norm/" not in i.scope
            if (i.opcode in ("dot", "convolution") or i.target.startswith("__cublas"))
            and parsed.depth(computation)
            and {"f32"} & set(parsed.operand_types(computation, i))
        }
    )


def name(row):
    return "-".join(row.values())


@pytest.mark.parametrize("row", every_pair(TRAINING), ids=name)
@pytest.mark.parametrize("target", ["h100:8", "v5e:2x4"])
def test_training(target, row):
    check_training(
        target, MESHES[row["mesh"]], row["program"],
        variant=row["rule"], remat=row["remat"], loss=row["loss"],
        **ATTENTION[row["attention"]], **WINDOWS[row["window"]],
    )  # fmt: skip


@pytest.mark.parametrize("mesh", ["data-fsdp", "tensor"])
@pytest.mark.parametrize("target", ["h100:8", "v5e:2x4"])
def test_sampled_loops(target, mesh):
    drawn = LoopSamplingConfig("log_normal_poisson", per="sequence", backward_loops=2)
    check(target, MESHES[mesh], "train", 4, sampling=drawn)


@pytest.mark.parametrize("remat", ["loop", "offload"])
@pytest.mark.parametrize("target", ["h100:8", "v5e:2x4"])
def test_random_numbers_inside_of_loops(target, remat):
    drawn = Parts({n: PARTS[n].Settings(on=True) for n in ("state_init", "state_noise")})
    check(target, MESHES["tensor"], "train", 4, parts=drawn, loss="RANDOM", remat=remat)


@pytest.mark.parametrize("row", every_pair(OTHERS), ids=name)
@pytest.mark.parametrize("target", ["h100:8", "v5e:2x4"])
def test_other_programs(target, row):
    check(
        target, MESHES[row["mesh"]], row["program"], 12,
        time=128 if row["window"] == "wide" else None, variant=row["rule"],
        **ATTENTION[row["attention"]], **WINDOWS[row["window"]],
    )  # fmt: skip


PLAIN = {
    "odd": {"seq_len": 255}, "wide heads": {"heads": 1, "width": 512},
    "narrow heads": {"heads": 4, "width": 256, "seq_len": 200},
}  # fmt: skip


@pytest.mark.parametrize(
    ("target", "program", "model"),
    [
        ("h100:8", "train", "odd"), ("h100:8", "train", "wide heads"),
        ("h100:8", "score", "wide heads"), ("v5e:2x4", "train", "narrow heads"),
        ("v5e:2x4", "prefill", "narrow heads"),
    ],
)  # fmt: skip
def test_what_no_kernel_takes_compiles_with_plain_attention(target, program, model):
    sizes = MESHES["data-fsdp" if PLAIN[model].get("heads") == 1 else "tensor"]
    check(target, sizes, program, 12, fused=False, **PLAIN[model])


@pytest.mark.parametrize("program", ["train", "score"])
@pytest.mark.parametrize("target", ["a100:8", "b200:8", "v5p:2x2x1", "v6e:2x4", "v4:2x2x1"])
def test_other_devices(target, program):
    sizes = (2, len(devices(target)) // 2, 1)
    if program == "train":
        check_training(target, sizes)
    else:
        check(target, sizes, program, 12)


def test_the_papers_own_step_compiles_for_eight_gpus():
    """What `python -m looped_jax.train --config configs/flt.py` compiles on such a machine."""
    config = resolve(Settings.from_dict(base.make("FLT", "paper")), vocab_size=151_669)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4843))
    mesh = programs.make_mesh((8, 1, 1), devices("h100:8"))
    rows = config.train.batch_size
    count = micro_batches(config, devices=8)
    compiled = programs.compiled("train", config, mesh, rows=rows, micro_batches=count)
    fused = kernels(hlo.Program.read(compiled.as_text()), "gpu")
    assert len(fused) == 3 * config.model.layers  # forward, recomputed, backward
    needed = compiled.memory_analysis()
    assert needed.temp_size_in_bytes + needed.argument_size_in_bytes < 8 * 2**30
