"""What is read from compiled programs: written ones here, real ones in tests/targets."""

import jax
import pytest

from looped_jax.config.settings import MeshConfig, ModelSettings, Settings
from looped_jax.planning import collectives, compiled_cost, hlo, step_time
from looped_jax.resolve import resolve
from looped_jax.runtime import hardware, sharding

BODY = 'metadata={op_name="jit(step)/shard_map/while/body/closed_call/micro_batch/jvp()/while/body/'
PROGRAM = """HloModule step

%sliced (p0: f32[12,4,8], p1: s32[], p2: f32[4,8]) -> f32[12,4,8] {
  %p0 = f32[12,4,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,4,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,4,8}
  %p2 = f32[4,8]{1,0} parameter(2)
  %b = f32[1,4,8]{2,1,0} bitcast(%p2)
  %sum = f32[1,4,8]{2,1,0} add(%one, %b)
  ROOT %u = f32[12,4,8]{2,1,0} dynamic-update-slice(%p0, %sum, %p1, %zero, %zero)
}

%body (state: f32[12,4,8]) -> f32[12,4,8] {
  %state = f32[12,4,8]{2,1,0} parameter(0)
  %n = s32[] constant(0)
  %q = bf16[2,3,1024,128]{3,2,1,0} parameter(1)
  %w = f32[8,16]{1,0} parameter(2)
  %x = f32[4,8]{1,0} parameter(3)
  %fusion = f32[12,4,8]{2,1,0} fusion(%state, %n, %x), kind=kLoop, calls=%sliced, \
BODYlayer_0/mlp/add"}, backend_config={"estimated_cycles":"1500"}
  %dot = f32[4,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
BODYlayer_0/mlp/dot_general"}, backend_config={"estimated_cycles":"3000"}
  %splash_mha_fwd_residuals.1 = bf16[2,3,1024,128]{3,2,1,0} custom-call(%q, %q, %q), \
custom_call_target="tpu_custom_call", BODYlayer_0/attention/mix/pallas_call"}
  ROOT %r = f32[12,4,8]{2,1,0} copy(%fusion), backend_config={"estimated_cycles":"600"}
}

%condition (state: f32[12,4,8]) -> pred[] {
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: f32[12,4,8]) -> f32[12,4,8] {
  %x = f32[12,4,8]{2,1,0} parameter(0)
  %start = f32[12,4,8]{2,1,0} all-reduce-start(%x), replica_groups=[1,8]<=[8], to_apply=%sum
  %scaled = f32[12,4,8]{2,1,0} multiply(%x, %x), metadata={op_name="jit(step)/optimizer/mul"}, \
backend_config={"estimated_cycles":"15"}
  %done = f32[12,4,8]{2,1,0} all-reduce-done(%start)
  %summed = f32[12,4,8]{2,1,0} add(%x, %x), backend_config={"estimated_cycles":"45"}, \
metadata={op_name="jit(step)/shard_map/while/body/closed_call/add"}
  %alike = f32[4,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(step)/layer_0/attention/dot_general"}, \
backend_config={"estimated_cycles":"30"}
  %whole = f32[12,4,8]{2,1,0} copy(%x), backend_config={"estimated_cycles":"7"}, \
metadata={op_name="jit(step)/shard_map/micro_batch/jvp(prelude_0)/attention/mul"}
  ROOT %v = f32[12,4,8]{2,1,0} while(%done), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
}
""".replace("BODY", BODY)


def parts_of(text):
    return costs(hlo.Program.read(text))[0]


@pytest.fixture(scope="module")
def read():
    program = hlo.Program.read(PROGRAM)
    return program, *costs(program)


def costs(program, mesh=None):
    model = resolve(
        Settings(model=ModelSettings(layers=1, width=384, heads=3, seq_len=1024)), vocab_size=97
    ).model
    mesh = mesh or sharding.make_mesh(MeshConfig(8, 1, 1), jax.devices()[:8])
    return compiled_cost.of_program(program, mesh, hardware.find("tpu-v5e"), model)


def test_a_fusion_reads_the_slice_it_needs_and_writes_the_one_it_changes(read):
    program, _, _ = read
    one = 4 * 4 * 8
    instructions = {i.name: (name, i) for name, i in program}
    assert program.traffic(*instructions["fusion"]) == 3 * one + 4  # and the index
    assert program.traffic(*instructions["dot"]) == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert program.product_flops(*instructions["dot"]) == 2 * 4 * 8 * 16
    assert program.fused == {"sliced", "sum"}


def test_cycles_are_those_of_the_part_they_stand_in_times_the_loops(read):
    _, parts, _ = read
    clock = hardware.find("tpu-v5e").clock
    # the copy says nothing of itself, and stands among the loop's
    assert parts["loop, forward"].seconds == pytest.approx(12 * 5100 / clock)
    assert parts["optimizer"].seconds == pytest.approx(15 / clock)
    # Sums over micro-batches, what loops have alike, and what surrounds them.
    rest = parts["rest of a micro-batch"].seconds
    assert rest == pytest.approx((45 + 30 + 7) / clock)
    assert parts["loop, backward"].seconds == parts["head and loss"].seconds == 0


def test_a_kernel_without_an_estimate_is_not_free(read):
    _, parts, calls = read
    assert calls == {"splash_mha_fwd_residuals": 12}
    blocks = 3 * 512 * 512  # of the four, one is hidden
    flops = 2 * 2 * 2 * 3 * blocks * 128
    bytes_moved = 4 * 2 * 2 * 3 * 1024 * 128
    device = hardware.find("tpu-v5e")
    charged = max(flops / device.peak_flops, bytes_moved / device.memory_bandwidth)
    assert parts["attention kernels"].charged == pytest.approx(12 * charged)
    assert parts["attention kernels"].seconds == parts["attention kernels"].charged


def test_a_collective_takes_what_other_work_does_not_hide(read):
    _, parts, _ = read
    device = hardware.find("tpu-v5e")
    sent = 2 * 7 / 8 * 4 * 12 * 4 * 8 / device.link
    hidden = 15 / device.clock
    assert parts["collectives in the open"].seconds == pytest.approx(max(0, sent - hidden))


def test_collectives_that_are_under_way_together_share_their_links(read):
    start = "  %start = f32[12,4,8]{2,1,0} all-reduce-start(%x), replica_groups=[1,8]<=[8], "
    other = f"{start}to_apply=%sum\n".replace("%start", "%second")
    done = "  %done = f32[12,4,8]{2,1,0} all-reduce-done(%start)\n"
    text = PROGRAM.replace(start, other + start).replace(
        done, done + done.replace("%done", "%both").replace("(%start)", "(%second)")
    )
    once, twice = (parts_of(one)["collectives in the open"].seconds for one in (PROGRAM, text))
    device = hardware.find("tpu-v5e")
    sent = 2 * 7 / 8 * 4 * 12 * 4 * 8 / device.link
    assert twice == pytest.approx(once + sent)


def test_a_kernel_that_nobody_knows_is_charged_with_its_bytes_and_named():
    text = PROGRAM.replace("splash_mha_fwd_residuals", "mystery")
    program = hlo.Program.read(text)
    assert compiled_cost.unknown_kernels(program) == {"mystery"}
    assert not compiled_cost.unknown_kernels(hlo.Program.read(PROGRAM))
    bytes_moved = 4 * 2 * 2 * 3 * 1024 * 128
    found = sum(part.charged for part in parts_of(text).values())
    assert found == pytest.approx(12 * bytes_moved / hardware.find("tpu-v5e").memory_bandwidth)


SCATTERED = """HloModule step

%all-reduce-scatter (input: f32[8,16,128]) -> f32[2,16,128] {
  %input = f32[8,16,128]{2,1,0} parameter(0)
  %whole = f32[8,16,128]{2,1,0} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%sum
  %place = s32[] constant(0)
  ROOT %piece = f32[2,16,128]{2,1,0} dynamic-slice(%whole, %place, %place, %place), \
dynamic_slice_sizes={2,16,128}
}

ENTRY %main (x: f32[8,16,128]) -> f32[2,16,128] {
  %x = f32[8,16,128]{2,1,0} parameter(0)
  ROOT %f = f32[2,16,128]{2,1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_sum_that_is_cut_in_the_same_kernel_is_a_scatter_and_is_waited_for():
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1), jax.devices()[:8])
    program, device = hlo.Program.read(SCATTERED), hardware.find("tpu-v5e")
    (found,) = collectives.of_program(program, mesh)
    sent = 3 / 4 * 8 * 16 * 128 * 4
    assert (found.kind, found.axes, found.purpose) == ("reduce-scatter", ("fsdp",), "gradients")
    assert found.bytes_sent == sent
    rate = step_time.rate(found, dict(mesh.shape), device)
    parts = costs(program, mesh)[0]
    assert parts["collectives in the open"].seconds == pytest.approx(sent / rate)
