"""Bytes that a training step holds on one device, counted from the model without compiling it.

`memory_analysis` of a compiled step tells what one compiler needs. The compiler for CPUs
materializes attention weights and turns bfloat16 products into float32, which a GPU or TPU with a
fused kernel does not: for them, this count is closer.

Residuals are the arrays that the forward pass saves for the backward pass, as JAX calls them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.sharding import Mesh

from looped_jax.config.options import Parts
from looped_jax.config.resolved import Config, ModelConfig
from looped_jax.model import attention_kernels, objectives, transformer
from looped_jax.model.loss import chunk_size
from looped_jax.training.train_state import TrainState

Array = jax.Array
UNLOOPED = ("prelude", "coda")  # parts whose layers run once


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, at the time of the backward pass when it holds most.

    parameters, optimizer: the shards that live between steps
    weights: whole float32 weights gathered over `fsdp`, and their copies in the compute type; with
    model.gather="layer" in that type alone, embedding and head and the largest layer
    gradients: whole float32 gradients, twice where micro-batches are summed; with "layer" those of
    the shards, and the whole of the largest layer, or of embedding and head
    saved_activations: residuals of all loops, and of layers that run once
    recomputed: residuals of one loop that the backward pass recomputes
    logits: one chunk of float32 logits and their gradient, in the type it is multiplied in
    """

    parameters: int
    optimizer: int
    weights: int
    gradients: int
    saved_activations: int
    recomputed: int
    logits: int

    @property
    def total(self) -> int:
        """The sum, but the larger of logits and a recomputed loop: they are never held together."""
        always = self.parameters + self.optimizer + self.weights + self.gradients
        return always + self.saved_activations + max(self.recomputed, self.logits)


def count(
    config: Config, mesh: Mesh, state: TrainState, *, kernel: str, micro_batches: int = 1
) -> Memory:
    """Memory of the train step of a resolved config whose abstract state is `state`.

    `kernel`: one of model/attention_kernels.py; any but "xla" never holds attention weights. Let
    S(K, remat) be the bytes of all residuals for K loops, weights left out: then saved_activations
    = S(K, remat), and recomputed = S(1, "none") − S(1, remat) of the loops alone. Temporary buffers
    of single operations and of the optimizer are not counted. In float32 with XLA's attention this
    is 0.88 to 1.03 times what the CPU compiler reports (18 small models, K from 4 to 12, one
    device), least where everything of few loops is saved: the compiler then holds a part of one
    loop twice. Layers that run once it does not recompute: outside of scans it takes what is to be
    computed again for what is there. Compilers of GPUs and TPUs keep the two apart.
    """
    model, rows, tensor = config.model, config.train.batch_size, mesh.shape["tensor"]
    weights, gradients = _weights_and_gradients(model, mesh, state, micro_batches)
    beforehand = objectives.of(model).weighs_beforehand  # then rounded as soon as they are made
    of_logits = jnp.dtype(model.dtype).itemsize if beforehand else 4
    # Layers that run once are recomputed one by one, and not beside a loop, which has no fewer.
    looped = looped_alone(model)
    everything = dataclasses.replace(looped, remat="none")

    def kept(model: ModelConfig, loops: int) -> int:
        return saved_residuals(model, rows, kernel, tensor, loops=loops)

    return Memory(
        parameters=shard_bytes(state.params.values()),
        optimizer=shard_bytes(jax.tree.leaves(state.optimizer)),
        weights=weights,
        gradients=gradients,
        saved_activations=kept(model, model.loops),
        recomputed=max(0, kept(everything, 1) - kept(looped, 1)),
        logits=(4 + of_logits) * logit_chunk(model, rows) * model.padded_vocab // tensor,
    )


def _weights_and_gradients(
    model: ModelConfig, mesh: Mesh, state: TrainState, micro_batches: int
) -> tuple[int, int]:
    """Bytes of weights that are gathered or cast, and of gradients; see Memory."""
    fsdp, sums = mesh.shape["fsdp"], 2 if micro_batches > 1 else 1
    itemsize = jnp.dtype(model.dtype).itemsize
    groups = {name: weight.kind for name, weight in transformer.weights(model).items()}
    sizes = {
        name: math.prod(leaf.sharding.shard_shape(leaf.shape)) * fsdp
        for name, leaf in state.params.items()
    }
    size = sum(sizes.values())
    if model.gather == "layer" and fsdp > 1:
        layers: dict[str, int] = defaultdict(int)  # by the name up to a layer's index
        outside = 0
        for name, own in sizes.items():
            if groups[name] == "matrix":
                layers[re.sub(r"(\.\d+)\..*", r"\1", name)] += own
            elif groups[name] != "vector":
                outside += own
        largest = max(layers.values())
        return itemsize * (outside + largest), 4 * (sums * size // fsdp + max(outside, largest))
    looked_up = "table" if "head" in groups.values() else None  # a tied table is a factor, too
    factors = sum(own for name, own in sizes.items() if groups[name] != looked_up)
    cast = 0 if model.dtype == "float32" else itemsize * factors
    return (4 * size if fsdp > 1 else 0) + cast, 4 * size * sums


def logit_chunk(model: ModelConfig, rows: int) -> int:
    """Tokens whose logits live at once in a micro-batch of `rows` rows; see model/loss.py."""
    return chunk_size(model, rows * model.seq_len)


def shard_bytes(leaves: Iterable[jax.Array | jax.ShapeDtypeStruct]) -> int:
    """Bytes of one device's shards of abstract or real arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def saved_residuals(
    model: ModelConfig, rows: int, kernel: str, tensor: int = 1, *, loops: int | None = None
) -> int:
    """Bytes of residuals of a forward pass over `rows` rows, weights left out.

    Those of JAX's own program with XLA's attention. A fused `kernel` saves its query, key, value
    and one float32 per query and head instead of what XLA's attention saves. `loops`: of so many
    loops, by default the model's own.
    """
    loops = model.loops if loops is None else loops
    # These have no part in what is traced.
    alike = dataclasses.replace(model, loss_chunk=None, kernel="xla", gather="step")
    size = _bytes(_model_residuals(alike, tensor), rows, loops)
    if kernel == "xla":
        return size
    all_heads = model.heads + 2 * model.kv_heads
    per_token = jnp.dtype(model.dtype).itemsize * model.head_dim * all_heads + 4 * model.heads

    def instead(window: int | None, times: int) -> int:
        """What a layer's fused attention saves less what XLA's does."""
        by_xla = _bytes(_attention_residuals(alike, window), rows, times)
        return (times * rows * model.seq_len * per_token - by_xla) // tensor

    if model.remat != "none":  # attention is recomputed
        return size
    size += unlooped(model) * instead(None, 1)
    return size + sum(instead(window, loops) for window in model.windows())


def looped_alone(model: ModelConfig) -> ModelConfig:
    """The model without the layers that run once."""
    parts = {name: part for name, part in model.parts.items() if name not in UNLOOPED}
    return dataclasses.replace(model, parts=Parts(parts))


def unlooped(model: ModelConfig) -> int:
    """Layers that run once, those of a coda once for each state that is read."""
    found = {name: model.parts[name].layers for name in UNLOOPED if name in model.parts.on()}
    return found.get("prelude", 0) + found.get("coda", 0) * len(model.scored_loops())


# Bytes by what they grow with: (loops, rows).
Growing = dict[tuple[bool, bool], int]
_ROWS = 7919  # of the traced program: a prime, so that no other size is a multiple of it


def _bytes(found: Growing, rows: int, loops: int) -> int:
    return sum(
        (loops if by_loop else 1) * (rows if by_row else 1) * size
        for (by_loop, by_row), size in found.items()
    )


@functools.lru_cache(maxsize=64)
def _model_residuals(model: ModelConfig, tensor: int) -> Growing:
    hidden = 4 * model.width
    params = transformer.init_shapes(model)
    tokens = jax.ShapeDtypeStruct((_ROWS, model.seq_len), jnp.int32)

    def states(params: transformer.Params, tokens: Array) -> Array:
        return transformer.forward(model, params, tokens, return_loops=model.scored_loops()).hidden

    def by_tensor(shape: tuple[int, ...]) -> bool:
        """Whether it is sharded over the tensor axis: by hidden units or by heads."""
        heads = {model.heads, model.kv_heads}.intersection(shape[1:-1])
        by_heads = len(shape) > 3 and shape[-1] != model.width and bool(heads)
        return shape[-1:] == (hidden,) or by_heads

    def share(shape: tuple[int, ...]) -> int:
        return tensor if by_tensor(shape) else 1

    return _residuals(states, params, tokens, loops=model.loops, share=share)


@functools.lru_cache(maxsize=64)
def _attention_residuals(model: ModelConfig, window: int | None) -> Growing:
    """Of XLA's attention in one layer, over all loops."""

    def looped(query: Array, key: Array, value: Array) -> Array:
        def loop(_: None, parts: tuple[Array, Array, Array]) -> tuple[None, Array]:
            return None, attention_kernels.plain(*parts, window)

        return jax.lax.scan(loop, None, (query, key, value))[1]

    query, key = (
        jax.ShapeDtypeStruct(
            (model.loops, _ROWS, model.seq_len, heads or 1, model.head_dim), jnp.dtype(model.dtype)
        )
        for heads in (model.heads, model.kv_heads)
    )
    return _residuals(looped, query, key, key, of=(0, 1, 2), loops=model.loops)


def _residuals(
    function: Callable,
    *args: Any,
    loops: int,
    of: tuple[int, ...] = (0,),
    share: Callable[[tuple[int, ...]], int] = lambda shape: 1,
) -> Growing:
    """Residuals of `function` for gradients by its arguments `of`, arguments left out.

    `loops`: length of the scan that grows with them; `share`: devices that an array of this shape
    is cut over.
    """

    def saved(*args: Any) -> list[Any]:
        def partly(*chosen: Any) -> Any:
            given = dict(zip(of, chosen, strict=True))
            return function(*(given.get(i, arg) for i, arg in enumerate(args)))

        return jax.tree.leaves(jax.vjp(partly, *(args[i] for i in of))[1])

    program = jax.make_jaxpr(saved)(*args).jaxpr
    stacked = {
        whole
        for equation in program.eqns
        if equation.primitive.name == "scan" and equation.params["length"] == loops
        for whole, one in zip(equation.outvars, equation.params["jaxpr"].out_avals, strict=True)
        if whole.aval.ndim > one.ndim  # else a carry
    }
    results = [v for v in program.outvars if isinstance(v, jax.extend.core.Var)]
    found: Growing = defaultdict(int)
    for v in set(results) - set(program.invars):
        array: Any = v.aval
        size = array.size * array.dtype.itemsize // share(array.shape)
        by_loop, by_row = v in stacked, size % _ROWS == 0
        found[by_loop, by_row] += size // (loops if by_loop else 1) // (_ROWS if by_row else 1)
    return found
