"""What a training step holds on one device, counted from the model itself, without compiling it.

The compiler's own figure (`memory_analysis` of the compiled step) belongs to the compiler that was
asked. The one for CPUs keeps the [T, T] attention weights of a loop and turns bfloat16 products
into float32, which those for GPUs and TPUs do not: there, this count is the better guide.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from looped_jax import sharding
from looped_jax.config import Config, ModelConfig
from looped_jax.model import transformer
from looped_jax.model.loss import LOGITS_AT_ONCE
from looped_jax.state import State


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, at the time of the backward pass when it holds most.

    parameters, optimizer: the shards that live between steps
    weights: whole float32 weights gathered over `fsdp`, and their copies in the compute type
    gradients: whole float32 gradients, twice where micro-batches are summed
    kept: what the forward pass leaves for the backward pass, all loops
    recomputed: of one loop, what the backward pass computes anew before it can use it
    logits: one chunk of float32 logits and their gradient
    """

    parameters: int
    optimizer: int
    weights: int
    gradients: int
    kept: int
    recomputed: int
    logits: int

    @property
    def total(self) -> int:
        """The sum, where logits and a recomputed loop take turns: the head comes before them."""
        always = self.parameters + self.optimizer + self.weights + self.gradients + self.kept
        return always + max(self.recomputed, self.logits)


def count(
    config: Config, mesh: Mesh, state: State, *, kernel: str, micro_batches: int = 1
) -> Memory:
    """Memory of the train step of a resolved config whose abstract state is `state`.

    `kernel`: of model/kernels.py; any but "xla" never holds attention weights. Let R(K, keep) be
    the bytes of all arrays that JAX's forward pass hands to its backward pass for K loops, weights
    left out: then kept = R(K, remat) and recomputed = R(1, "none") − R(1, remat). Left out are the
    passing buffers of single operations and of the optimizer.
    """
    model, rows, tensor = config.model, config.train.batch_size, mesh.shape["tensor"]
    size, looped = (
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        * mesh.shape["fsdp"]
        for leaves in (
            state["params"].values(),
            [leaf for name, leaf in state["params"].items() if name.startswith("blocks")],
        )
    )
    head = model.padded_vocab * (model.width or 0) // tensor
    cast = 0 if model.dtype == "float32" else jnp.dtype(model.dtype).itemsize * (looped + head)
    once = dataclasses.replace(model, loops=1, loss="END")
    plain = dataclasses.replace(once, remat="none")
    chunk = model.loss_chunk or max(1, LOGITS_AT_ONCE // model.padded_vocab)
    chunk = min(chunk, rows * model.seq_len)
    return Memory(
        parameters=shard_bytes(state["params"].values()),
        optimizer=shard_bytes(jax.tree.leaves(state["optimizer"])),
        weights=(4 * size if mesh.shape["fsdp"] > 1 else 0) + cast,
        gradients=4 * size * (2 if micro_batches > 1 else 1),
        kept=handed_over(model, rows, kernel, tensor),
        recomputed=max(
            0, handed_over(plain, rows, kernel, tensor) - handed_over(once, rows, kernel, tensor)
        ),
        logits=2 * 4 * chunk * model.padded_vocab // tensor,
    )


def shard_bytes(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Bytes of one device's shards of abstract or real arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def handed_over(model: ModelConfig, rows: int, kernel: str, tensor: int = 1) -> int:
    """Bytes that the forward pass over `rows` rows hands to the backward pass, weights left out.

    With a fused `kernel`, attention weights [.., T, T] give way to one float32 per query and head.
    """
    one, two = (_handed_over(model, n, kernel, tensor) for n in (1, 2))
    return one + (rows - 1) * (two - one)  # tables of positions do not grow with the rows


@functools.lru_cache(maxsize=64)
def _handed_over(model: ModelConfig, rows: int, kernel: str, tensor: int) -> int:
    model = dataclasses.replace(model, kernel="xla")  # traced anywhere; its weights are known below
    params = jax.eval_shape(lambda: transformer.init_params(model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((rows, model.seq_len), jnp.int32)

    def backward_inputs(params, tokens):
        def states(params):
            wanted = model.scored_loops()
            return transformer.forward(model, params, tokens, wanted=wanted).hidden

        return jax.tree.leaves(jax.vjp(states, params)[1])

    program = jax.make_jaxpr(backward_inputs)(params, tokens).jaxpr
    given = {id(variable) for variable in program.invars}
    arrays = {
        id(variable): variable.aval
        for variable in program.outvars
        if isinstance(variable, jax.extend.core.Var) and id(variable) not in given
    }
    return sum(_bytes(array, model, kernel, tensor) for array in arrays.values())


def _bytes(array: jax.core.ShapedArray, model: ModelConfig, kernel: str, tensor: int) -> int:
    shape, time = array.shape, model.seq_len
    size = array.size * array.dtype.itemsize
    if shape[-2:] == (time, time):
        if kernel != "xla":
            return 0
        return size // tensor
    heads = {model.heads, model.kv_heads}
    by_head = len(shape) > 3 and not heads.isdisjoint(shape[2:-1])
    hidden = shape[-1] == 4 * (model.width or 0)
    return size // tensor if by_head or hidden else size
