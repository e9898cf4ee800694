"""What one step sends between devices, counted before anything is compiled.

The step itself states the collectives of the batch axes and of the optimizer: they are read from
the traced program, with the lengths of the scans around them. Those of the `tensor` axis are added
by the compiler, and counted by formula.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax.extend.core
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn
from jax.sharding import Mesh

from looped_jax.config.resolved import Config
from looped_jax.planning.collectives import Collective, Found, purpose_of, ring, summed
from looped_jax.planning.memory import unlooped
from looped_jax.runtime import sharding
from looped_jax.runtime.sharding import Weight

# JAX's names of them, without what it says of the types of their results.
KINDS = {
    "all_gather": "all-gather", "psum": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce",
    "reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}  # fmt: skip


def stated(program: Jaxpr, mesh: Mesh, weights: Mapping[str, Weight]) -> list[Collective]:
    """Collectives that a traced program names itself, loops counted, the largest first.

    bytes_sent as collectives.read counts them. Of weights and gradients the program states what the
    `tensor` axis does not cut yet: compilers sum a device's share of it, but make it whole before
    they gather or scatter it over another axis. Raises ValueError for a loop of unknown length
    around one.
    """
    share, tensor = _share_of_tensor(mesh, weights), mesh.shape["tensor"]
    found: Found = defaultdict(list)
    for equation, scope, times, depth in equations(program):
        primitive = equation.primitive.name.removesuffix("_invariant")
        if primitive not in KINDS:
            continue
        named = equation.params.get("axes", equation.params.get("axis_name"))
        named = named if isinstance(named, (tuple, list)) else (named,)
        axes = tuple(axis for axis in mesh.axis_names if axis in named and mesh.shape[axis] > 1)
        if not axes:  # a group of one device sends nothing
            continue
        if math.isnan(times):
            raise ValueError(f"a loop of unknown length communicates, in {scope}")
        devices = math.prod(mesh.shape[axis] for axis in axes)
        results: list[Any] = [v.aval for v in equation.outvars]
        size = sum(array.size * array.dtype.itemsize for array in results)
        purpose = purpose_of(f"{scope}/{primitive}")
        kind = KINDS[primitive]
        if purpose in ("weights", "gradients") and tensor > 1:
            if kind == "all-reduce":
                size = round(size * share)
            else:
                made_whole = size / devices if kind == "all-gather" else size * devices
                found["all-gather", ("tensor",), tensor, purpose, depth].append(
                    (int(times), times * made_whole * (1 - share))
                )
        found[kind, axes, devices, purpose, depth].append(
            (int(times), times * size * ring(kind, devices))
        )
    return summed(found)


def _share_of_tensor(mesh: Mesh, weights: Mapping[str, Weight]) -> float:
    """Part of all weights that the `tensor` axis leaves a device."""
    cuts, devices = sharding.specs(weights), mesh.shape["tensor"]
    whole = {name: math.prod(weight.shape) for name, weight in weights.items()}
    own = sum(n / (devices if "tensor" in cuts[name] else 1) for name, n in whole.items())
    return own / sum(whole.values())


def of_tensor(config: Config, mesh: Mesh, *, micro_batches: int) -> list[Collective]:
    """Collectives that a compiler adds for the `tensor` axis: of activations, in their type.

    A layer's two outputs are sums over all heads and hidden units, and so are the gradients of what
    goes into its four products with cut columns: query, key, value and the first of the MLP; a
    latent of keys and values is as wide as it is. remat "loop" forms those outputs again, but
    for the second of a layer that runs once. The looked up table and the gradient of what the head
    reads are such sums, too. Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
    """
    devices, model = mesh.shape["tensor"], config.model
    if devices == 1:
        return []
    state = config.train.batch_size * model.seq_len * model.width
    looped, once = model.loops * model.layers, unlooped(model)
    outputs = looped * 4 + once * 3 if model.remat == "loop" else (looped + once) * 2
    latent = model.latent_rank / model.width if model.attention == "mla" else 1
    states = outputs + (looped + once) * (2 + 2 * latent) + model.read_outs() + 1
    calls = outputs + (looped + once) * 4 + model.read_outs() + 1
    size = states * state * jnp.dtype(model.dtype).itemsize
    return [
        Collective(
            "all-reduce",
            ("tensor",),
            devices,
            "activations",
            micro_batches * calls,
            round(micro_batches * size * ring("all-reduce", devices)),
            depth=2,
        )
    ]


def equations(
    program: Jaxpr, scope: str = "", times: float = 1, depth: int = 0
) -> Iterator[tuple[JaxprEqn, str, float, int]]:
    """All equations with their scope, how often they run, and the loops around them."""
    for equation in program.eqns:
        within = f"{scope}/{equation.source_info.name_stack}"
        yield equation, within, times, depth
        inner, deeper = times, depth
        if equation.primitive.name == "scan":
            inner, deeper = times * equation.params["length"], depth + 1
        elif equation.primitive.name == "while":
            inner, deeper = math.nan, depth + 1
        for called in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(called, within, inner, deeper)
