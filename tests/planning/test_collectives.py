"""Reading collectives from compiled programs: written ones here, real ones in test_plan.py."""

import jax
import pytest

from looped_jax.config.settings import MeshConfig
from looped_jax.planning import collectives
from looped_jax.runtime import sharding

PROGRAM = """HloModule step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (state: f32[4,8]) -> f32[4,8] {
  ROOT %r = f32[4,8]{1,0} all-reduce(%state), replica_groups=[4,2]<=[8], to_apply=%sum, \
metadata={op_name="jit(step)/shard_map/while/body/layer_0/mlp/dot_general"}
}

%condition (state: f32[4,8]) -> pred[] {
  ROOT %less = pred[] constant(true)
}

%outer (state: f32[4,8]) -> f32[4,8] {
  ROOT %w = f32[4,8]{1,0} while(%state), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
}

%condition.2 (state: f32[4,8]) -> pred[] {
  ROOT %less.2 = pred[] constant(true)
}

ENTRY %main (x: f32[4,8], y: f32[2,8]) -> f32[4,8] {
  %g = f32[4,8]{1,0} all-gather(%y), replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}, \
metadata={op_name="jit(step)/shard_map/all_gather"}
  %s = f32[1,8]{1,0} reduce-scatter(%g), replica_groups=[2,4]<=[2,2,2]T(2,0,1), to_apply=%sum, \
metadata={op_name="jit(step)/shard_map/reduce_scatter"}
  %t = (f32[2,8]{1,0}, f32[2,8]{1,0}) all-to-all(%g, %g), \
replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
metadata={op_name="jit(step)/optimizer/newton_schulz/shard_map/all_to_all"}
  %p = f32[4,8]{1,0} collective-permute(%g), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %alone = f32[4,8]{1,0} all-reduce(%g), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
  ROOT %v = f32[4,8]{1,0} while(%x), condition=%condition.2, body=%outer, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


class Program:
    def __init__(self, text):
        self.as_text = lambda: text


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])


def test_axes_bytes_purposes_and_nested_loops(mesh):
    found = {c.kind: c for c in collectives.read(Program(PROGRAM), mesh)}
    whole = 4 * 8 * 4
    expected = {
        "all-reduce": (("tensor",), 2, "activations", 36, 36 * whole),  # twice 1/2
        "all-gather": (("fsdp",), 2, "weights", 1, whole // 2),
        "reduce-scatter": (("data", "fsdp"), 4, "gradients", 1, 3 * 8 * 4),
        "all-to-all": (("data",), 2, "optimizer", 1, whole // 2),
        "collective-permute": (("tensor",), 2, "other", 1, whole),
    }
    assert found.keys() == expected.keys()
    for kind, (axes, devices, purpose, calls, bytes_sent) in expected.items():
        depth = 2 if purpose == "activations" else 0
        assert found[kind] == collectives.Collective(
            kind, axes, devices, purpose, calls, bytes_sent, depth
        )


def test_a_loop_of_unknown_length_is_refused(mesh):
    text = PROGRAM.replace('"known_trip_count":{"n":"12"}', "")
    with pytest.raises(ValueError, match="a loop of unknown length communicates"):
        collectives.read(Program(text), mesh)


# As the compilers for GPUs and TPUs print them: asynchronous pairs, types with tiles and memory
# spaces, groups by mesh axis, and loops whose length stands in their condition alone.
OTHERS = """HloModule step, is_scheduled=true

%condition (state: (s32[], bf16[4,8])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %r = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), \
replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}, to_apply=%sum, \
metadata={op_name="jit(step)/while/body/mlp/dot_general"}
}

ENTRY %main.1_spmd (x: f32[2,8]) -> f32[4,8] {
  %g = ((f32[2,8]{1,0}, f32[2,4]{1,0}), (f32[4,8]{1,0}, /*index=3*/f32[4,4]{1,0})) \
all-gather-start(%x, %y), channel_id=1, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}, \
metadata={op_name="jit(step)/shard_map/all_gather"}
  %p = (f32[1024]{0}, f32[1024]{0}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %c = bf16[4,8]{1,0} all-to-all(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
frontend_attributes={chain_id="0"}
  %c.1 = bf16[4,8]{1,0} all-to-all(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
frontend_attributes={chain_id="0"}
  %k = f32[4,8]{1,0:T(8,128)} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"TUzvUg==",
"metadata":"of several lines"
}}, metadata={op_name="jit(step)/mix"}
  %g.1 = (f32[4,8]{1,0}, f32[4,4]{1,0}) all-gather-done(%g)
  ROOT %w = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) while(%t), condition=%condition, \
body=%body
}
"""


def test_what_other_compilers_print_is_read_too(mesh):
    found = {c.kind: c for c in collectives.read(Program(OTHERS), mesh)}
    gathered = (4 * 8 + 4 * 4) * 4
    assert found == {
        "all-to-all": collectives.Collective("all-to-all", ("data",), 2, "other", 1, 4 * 8),
        "collective-permute": collectives.Collective(
            "collective-permute", ("tensor",), 2, "other", 1, 4096
        ),
        "all-gather": collectives.Collective(
            "all-gather", ("fsdp",), 2, "weights", 1, gathered // 2
        ),
        "all-reduce": collectives.Collective(
            "all-reduce", ("tensor",), 2, "activations", 12, 12 * 4 * 8 * 2, depth=1
        ),
    }
