"""The looped transformer: embed, run the same L blocks K times in one scan, read out.

Legend: B batch, T time, D width, V vocabulary (Vp padded to a multiple of 64), K loops, L layers.

Parameters are a flat dict {"embed": [Vp, D], "blocks.0.attention.query": [D, D], …, "head":
[D, Vp]}. No shape of the plain model holds K: any number of loops runs with the same weights.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config.registry import EMBEDDINGS, LOOP_RULES
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ArgumentError
from looped_jax.model import attention_kernels, random_numbers
from looped_jax.model.attention_kernels import Attend, plain
from looped_jax.model.block import Block, rope_tables
from looped_jax.model.cut_weight import CutWeight, gathered
from looped_jax.model.full_pass import FullPass
from looped_jax.model.kv_cache import Cache, Finder, Pages, Past, Slots, empty, scope_of
from looped_jax.model.loop_scan import scan_loops
from looped_jax.model.norm import Norm
from looped_jax.model.parts.base import NORMED, Here, make_parts, through
from looped_jax.model.probe import BLIND, Probe, View, mean_norm
from looped_jax.model.random_numbers import RandomNumbers
from looped_jax.model.soft_cap import soft_cap
from looped_jax.model.weights import Weight, described
from looped_jax.runtime import sharding

Array = jax.Array
Params = dict[str, Array]  # in training some may be a CutWeight; see model/cut_weight.py
# (loop, layer) -> the History of that place; None where a place is of no loop, or of no layer.
Histories = Callable[[Any, "int | None"], Any]


class LoopStates(NamedTuple):
    """What the loops leave behind.

    hidden: [N, B, T, D] normalised state after each of N loops, what the head reads
    norms: [K] mean over tokens of the stream's L2 norm at the end of each loop, before closing norm
    seen: what a probe kept, stacked over loops; see model/probe.py
    """

    hidden: Array
    norms: Array
    seen: Any = None


class LoopedTransformer(nnx.Module):
    """L blocks, looped by a rule, between an embedding and a head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = EMBEDDINGS[config.embedding](config)
        self.embed = self.embedding.embed(rngs)
        self.blocks = nnx.List([Block(config, n, rngs=rngs) for n in range(config.layers)])
        self.head = self.embedding.head(rngs)
        self.norm = Norm(config)  # what every loop closes with
        self.rule = LOOP_RULES[config.variant](config, rngs=rngs)
        self.parts = make_parts(config, None, rngs=rngs)

    def enter(
        self, tokens: Array, positions: Array, history: Histories, seeds: Array | None = None
    ) -> Here:
        """Embedded tokens, and what parts look up once, before the loops."""
        with jax.named_scope("embed"):
            e = self.embedding.look_up(tokens, self.embed)
        own = self.config.rope
        rope = rope_tables(positions, self.config.head_dim, e.dtype, own) if own.on else None
        here = Here(
            tokens, e, history=history(None, None), carried={},
            entry={} if self.config.norm.embedding else {NORMED: True},
            positions=positions, rope=rope,
        )  # fmt: skip
        if random_numbers.in_model(self.config):
            here = here._replace(random=RandomNumbers.of(seeds, positions))
        e = through(self.parts, "entry", e, here)
        for layer, block in enumerate(self.blocks):
            of_layer = here._replace(e=e, layer=layer, history=history(None, layer))
            e = through(block.parts, "entry", e, of_layer)
        return here._replace(e=e, carried=jax.tree.map(jnp.zeros_like, here.carried))

    def begin(self, here: Here) -> tuple[Array, dict[str, Any]]:
        """Before the first loop: the state [B, T, D], zero where no part gives another; carried."""
        return through(self.parts, "initial_state", jnp.zeros_like(here.e), here), here.carried

    def first(self, loop: Array) -> Array:
        """Whether a loop has no state before it; where a part gives one, none is the first."""
        given = any(hasattr(part, "initial_state") for part in self.parts.values())
        return jnp.zeros_like(loop, bool) if given else loop == 0

    def loop(self, here: Here, history: Histories, view: View) -> Array:
        """One loop: the stream [B, T, D] after its last layer."""
        here = here._replace(history=history(here.loop, None))
        x = self.rule.start(here.at("rule"))
        x = view("start", None, through(self.parts, "loop_start", x, here))
        for layer, block in enumerate(self.blocks):  # the same L blocks every time
            with jax.named_scope(f"layer_{layer}"):
                of_layer = here._replace(layer=layer, history=history(here.loop, layer))
                x = through(self.parts, "layer_start", x, of_layer)
                x = through(block.parts, "stream", x, of_layer)
                # A rule may change the stream, or only where the layer's queries come from.
                x, query_source = self.rule.inject(x, of_layer.at("rule"))
                x = block(x, query_source, of_layer, view)
                x = through(self.parts, "layer_end", x, of_layer)
        return through(self.parts, "loop_end", x, here)

    def leave(self, h: Array, carried: dict[str, Any], here: Here) -> Array:
        """The state [B, T, D] that the head reads, of a loop's own and what parts hand on."""
        return through(self.parts, "exit", h, here._replace(h=h, carried=carried))

    def read_out(self, h: Array) -> Array:
        """Float32 logits [..., Vp] of states [..., D]: c · tanh(h @ head / c), if capped."""
        z = self.embedding.read_out(h, self.embed, self.head)
        z = through(self.parts, "readout", z, Here(h=h))
        cap = self.config.soft_cap
        return soft_cap(z, cap) if cap else z

    def __call__(
        self,
        tokens: Array,
        loops: int,
        return_loops: tuple[int, ...],
        past: Past | None = None,
        probe: Probe = BLIND,
        attend: Attend = plain,
        start: Array | None = None,
        done: int = 0,
        seeds: Array | None = None,
    ) -> tuple[LoopStates, Cache | None]:
        """States after `return_loops`, and the cache as `past` now is.

        With a state `start` [B, T, D] that `done` loops have left, they are not run again.
        """

        def other_tokens(cache: Cache | None, view: View = BLIND) -> Pages | FullPass:
            """What places look back at: earlier calls in a cache, or the row itself."""
            return Pages(past, cache, attend) if past and cache else FullPass(attend, view)

        before = other_tokens(past.cache if past else None)
        positions = jnp.arange(tokens.shape[1]) if past is None else past.positions
        here = self.enter(tokens, positions, before.open, seeds)
        collect = return_loops != (loops - 1,)  # the last state is the scan's carry
        exits = any(hasattr(part, "exit") for part in self.parts.values())

        def one_loop(carry: tuple[Array, Any, Cache | None], of_loop: tuple[Array, Any]):
            (h, carried, cache), (index, inputs) = carry, of_loop
            view = probe.view(index, inputs)
            before = other_tokens(cache, view)
            now = here._replace(h=h, loop=index, first=self.first(index), carried=carried)
            x = self.loop(now, before.open, view)
            h = view("state", None, self.norm(x))
            left = (h, now.carried if exits else None) if collect else None
            return (h, now.carried, before.cache), (left, mean_norm(x), view.seen())

        h, carried = self.begin(here)
        carry = h if start is None else start, carried, before.cache
        (h, carried, cache), (left, norms, seen) = scan_loops(
            one_loop, carry, done, loops, inputs=probe.inputs, remat=self.config.remat
        )
        if collect:
            read = jnp.array([k - done for k in return_loops])
            hidden, carried = jax.tree.map(lambda x: x[read], left)
        else:
            hidden, carried = jax.tree.map(lambda x: x[None], (h, carried if exits else None))
        if exits:
            before = other_tokens(cache)
            here = here._replace(history=before.open(None, None))
            each = [jax.tree.map(operator.itemgetter(n), carried) for n in range(len(hidden))]
            hidden = jnp.stack(
                [self.leave(h, own, here) for h, own in zip(hidden, each, strict=True)]
            )
            cache = before.cache
        return LoopStates(hidden, norms, seen), cache


@functools.lru_cache
def weights(config: ModelConfig) -> dict[str, Weight]:
    """Shape, axes and optimizer group of every parameter, by name; nothing is computed."""
    return described(nnx.eval_shape(lambda: _make(config, jax.random.key(0))))


def _make(config: ModelConfig, key: Array) -> LoopedTransformer:
    rngs = nnx.Rngs(key, parts=jax.random.fold_in(key, 1)) if config.parts.on() else nnx.Rngs(key)
    return LoopedTransformer(config, rngs=rngs)


def init_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the parameters."""
    return {n: jax.ShapeDtypeStruct(w.shape, jnp.float32) for n, w in weights(config).items()}


def init_params(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 weights: unit-normal embedding, uniform inputs, zero outputs, tiny head."""
    state = nnx.state(_make(config, key), nnx.Param)
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    *,
    loops: int | None = None,
    return_loops: tuple[int, ...] | None = None,
    probe: Probe = BLIND,
    attend: Attend = plain,
    start: Array | None = None,
    done: int = 0,
    seeds: Array | None = None,
) -> LoopStates:
    """Run `loops` loops over tokens [B, T]; the states after `return_loops`, counted from 0.

    By default the config's own K, and the last. The state after loop k is what a model of k + 1
    loops ends with, so one pass serves every smaller loop count. Computes in `config.dtype`.
    `probe`: see model/probe.py. `attend`: see model/attention_kernels.py; plain attention runs
    anywhere. `start` [B, T, D]: go on from this state, which `done` loops have left. `seeds` uint32
    [B]: of the rows, in training alone; see model/random_numbers.py.
    """
    loops = config.loops if loops is None else loops
    return_loops = (loops - 1,) if return_loops is None else return_loops
    if not return_loops or not all(done <= k < loops for k in return_loops):
        raise ValueError(f"return_loops={return_loops} must name loops {done} to {loops - 1}")
    if start is not None and (names := carried_names(config)):
        raise ArgumentError(
            f"start is a state alone, and {', '.join(names)} hands on more from loop to loop; run "
            "all loops, without start"
        )
    model = bind(config, params)
    return model(
        tokens,
        loops,
        return_loops,
        probe=probe,
        attend=attend,
        start=start,
        done=done,
        seeds=seeds,
    )[0]


def read_out(config: ModelConfig, params: Params, hidden: Array) -> Array:
    """Float32 logits [..., Vp] of states [..., D], of all entries of the padded vocabulary."""
    return bind(config, params).read_out(hidden)


@functools.lru_cache
def read_out_weights(config: ModelConfig) -> tuple[str, ...]:
    """Names of the parameters that read_out takes its logits from."""
    hidden = jax.ShapeDtypeStruct((1, config.width), config.dtype)
    shapes = init_shapes(config)
    names = sorted(shapes)
    leaves = [shapes[name] for name in names]
    program = jax.make_jaxpr(
        lambda leaves, h: read_out(config, dict(zip(names, leaves, strict=True)), h)
    )(leaves, hidden).jaxpr
    used = {id(v) for equation in program.eqns for v in equation.invars}
    return tuple(name for name, v in zip(names, program.invars, strict=False) if id(v) in used)


def stop_logits(config: ModelConfig, params: Params, hidden: Array) -> Array:
    """Float32 logits [...] of leaving after the loop that left states [..., D], as a part says."""
    z = jnp.zeros(hidden.shape[:-1], jnp.float32)
    return through(bind(config, params).parts, "stop", z, Here(h=hidden))


def shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter lies on `mesh`, by name."""
    specs = sharding.specs(weights(config))
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def whole_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """As `shardings`, but whole on every batch device: for programs that run again and again."""
    specs = sharding.specs(weights(config))
    return {
        name: NamedSharding(mesh, P(*(a if a == "tensor" else None for a in spec)))
        for name, spec in specs.items()
    }


def on_mesh(
    config: ModelConfig,
    mesh: Mesh,
    work: Callable,
    *,
    in_specs: tuple,
    out_specs: Any,
    gathered: bool = False,
) -> Callable:
    """(params, *arguments) -> work(params, *arguments), with every batch device on its own rows.

    For programs without gradients: `work` sees whole weights in the compute type, gathered once,
    and what `in_specs` leave of the other arguments. The `tensor` axis stays automatic in it.
    `gathered`: the batch axes do not cut the params it is given, as `whole_shardings` has them.
    """
    cuts = sharding.manual_specs(mesh, weights(config))
    cuts = {name: P() for name in cuts} if gathered else cuts

    def local(shards: Params, *arguments: Any) -> Any:
        # The TPU's compiler would move both gathers into the loop: K times the messages.
        whole = jax.lax.optimization_barrier(prepare(config, shards, cuts))
        return jax.lax.optimization_barrier(work(whole, *arguments))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(cuts, *in_specs),
        out_specs=out_specs,
        axis_names=set(sharding.BATCH_AXES),
        check_vma=False,
    )


def prepare(
    config: ModelConfig, shards: Params, cuts: dict[str, P], *, gradients: bool = False
) -> Params:
    """The whole weights that all visits of a step use, from this device's shards, made once.

    Without gradients they are rounded before they travel: half the bytes, and the products would
    round them anyway. With gradients the float32 masters are gathered; see model/linear.py. With
    model.gather="layer" that is true of vectors alone, and all else stays cut: a CutWeight.
    """
    if not gradients:
        return sharding.gather(cast(shards, config.dtype), cuts)
    if config.gather == "step":
        return sharding.gather(shards, cuts)
    found: dict[str, Any] = {}
    for name, shard in shards.items():
        if weights(config)[name].kind != "vector" and (kept := _cut(shard, cuts[name])):
            found[name] = kept
    others = {name: shard for name, shard in shards.items() if name not in found}
    return found | sharding.gather(others, cuts)


def _cut(shard: Array, cut: P) -> CutWeight | None:
    """What stands for a weight that is cut along its first or last axis, None for others."""
    axes = [axis for axis, name in enumerate(cut) if name is not None]
    if len(axes) != 1 or axes[0] not in (0, shard.ndim - 1):
        return None
    return CutWeight(shard, 0 if axes[0] == 0 else -1, cut[axes[0]])


def whole_outside_of_layers(config: ModelConfig, params: Params) -> Params:
    """The same with embedding and head whole, for a micro-batch: chunks of logits share the head.

    What layers multiply by stays cut, if it is: see `prepare`.
    """
    read = read_out_weights(config)

    def whole(name: str, weight: Any) -> Any:
        outside = name in read or weights(config)[name].kind != "matrix"
        cut = isinstance(weight, CutWeight)
        return gathered(weight, config.dtype) if cut and outside else weight

    return {name: whole(name, weight) for name, weight in params.items()}


def make_hidden_states(
    config: ModelConfig, mesh: Mesh, loop_counts: tuple[int, ...]
) -> Callable[[Params, Array], Array]:
    """(params, tokens [B, T]) -> states [N, B, T, D] after each of N loop counts, in one pass.

    For programs on the devices of `mesh`, by the attention kernel that suits them.
    """
    attend, return_loops = (
        attention_kernels.for_mesh(config, mesh),
        tuple(k - 1 for k in loop_counts),
    )

    def states(params: Params, tokens: Array) -> Array:
        return forward(
            config, params, tokens, loops=max(loop_counts), return_loops=return_loops, attend=attend
        ).hidden

    return states


@functools.lru_cache
def history_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What parts and the rule look back at, by name, [1, 1, …] each; by one abstract pass."""
    found: dict[str, Array] = {}

    def history(loop: Array | None, layer: int | None) -> Finder:
        return Finder(found, scope_of(loop, layer))

    def look(params: Params) -> dict[str, Array]:
        model, tokens = bind(config, params), jnp.zeros((1, 1), jnp.int32)
        here = model.enter(tokens, jnp.zeros((1,), jnp.int32), history)
        (h, carried), loop = model.begin(here), jnp.zeros([], jnp.int32)
        now = here._replace(h=h, carried=carried, loop=loop, first=model.first(loop))
        model.leave(model.loop(now, history, BLIND), now.carried, here)
        return found

    return jax.eval_shape(look, init_shapes(config))


@functools.lru_cache
def carried_names(config: ModelConfig) -> tuple[str, ...]:
    """What goes from loop to loop beside the state, by name; by one abstract pass."""

    def look(params: Params) -> dict[str, Any]:
        model, tokens = bind(config, params), jnp.zeros((1, 1), jnp.int32)
        return model.enter(tokens, jnp.zeros((1,), jnp.int32), FullPass(plain).open).carried

    return tuple(jax.eval_shape(look, init_shapes(config)))


def empty_cache(
    config: ModelConfig, *, batch: int, length: int, loops: int, kind: str = "exact"
) -> Cache:
    """A cache for `batch` sequences of up to `length` tokens; see model/kv_cache.py."""
    return empty(config, history_shapes(config), batch=batch, length=length, loops=loops, kind=kind)


def cache_bytes_per_token(config: ModelConfig, loops: int, kind: str = "exact") -> int:
    """Cache bytes that one more token of one sequence takes."""
    cache = jax.eval_shape(lambda: empty_cache(config, batch=1, length=1, loops=loops, kind=kind))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def extend(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    cache: Cache,
    *,
    loops: int | None = None,
    kind: str = "exact",
    first: bool = False,
    attend: Attend = plain,
) -> tuple[Array, Cache]:
    """Last loop's states [B, T, D] of new tokens [B, T] that follow what the cache holds.

    `positions` [B, T] are the tokens' places in their sequences, which need not be alike. With the
    exact cache this equals the full forward pass over the whole sequences. `first`: the cache is
    empty and every row starts at position 0, so that `attend` serves as in a full pass.
    """
    loops = config.loops if loops is None else loops
    slots = Slots.of(config, loops, kind)
    model = bind(config, params)
    past = Past(cache, slots, positions, first)
    states, extended = model(tokens, loops, (loops - 1,), past, attend=attend)
    assert extended is not None
    return states.hidden[0], extended


def cast(params: Params, dtype: str) -> Params:
    """Weights in the compute type, for use without gradients: half the memory to read per token."""
    return {name: weight.astype(dtype) for name, weight in params.items()}


def bind(config: ModelConfig, params: Params) -> LoopedTransformer:
    """The module with these weights in place; costs nothing once traced."""
    skeleton, state = _skeleton(config)
    leaves = [(path, leaf.replace(params[".".join(map(str, path))])) for path, leaf in state]
    return nnx.merge(skeleton, nnx.from_flat_state(leaves))


@functools.lru_cache
def _skeleton(config: ModelConfig):
    model = nnx.eval_shape(lambda: _make(config, jax.random.key(0)))
    skeleton, state = nnx.split(model, nnx.Param)
    return skeleton, tuple(nnx.to_flat_state(state))
