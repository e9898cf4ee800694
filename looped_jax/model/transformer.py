"""The looped transformer: embed, run the same L blocks K times in one scan, read out.

Legend: B batch, T time, D width, V vocabulary (Vp padded to a multiple of 64), K loops, L layers.

Parameters are a flat dict {"embed": [Vp, D], "blocks.0.attention.query": [D, D], …, "head":
[D, Vp]}. No shape holds K, so any number of loops runs with the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from looped_jax.config import ModelConfig
from looped_jax.model import attention_kernels
from looped_jax.model.attention_kernels import Attend, plain
from looped_jax.model.block import Block, Mix, rms_norm, rope_tables, without_past
from looped_jax.model.kv_cache import Cache, Past, Slots, remember
from looped_jax.model.linear import PRODUCT
from looped_jax.model.loop_rules import RULES
from looped_jax.model.taps import Trace, attend_openly, mean_norm
from looped_jax.model.weights import Weight, described, weight
from looped_jax.runtime import sharding

Array = jax.Array
Params = dict[str, Array]


class LoopStates(NamedTuple):
    """What the loops leave behind.

    hidden: [N, B, T, D] normalised state after each of the N wanted loops, what the head reads
    norms: [K] mean over tokens of the stream's L2 norm at the end of each loop, before closing norm
    layer_norms: [K, L] the same after every layer; None unless taps are given
    """

    hidden: Array
    norms: Array
    layer_norms: Array | None = None


class LoopedTransformer(nnx.Module):
    """L blocks, looped. Embedding and head are separate matrices."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        assert config.width
        self.config = config
        table = (config.padded_vocab, config.width)
        embed = jax.random.normal(rngs.params(), table)
        self.embed = weight(embed, "vocab", "embed", group="table")
        self.blocks = nnx.List([Block(config, window, rngs=rngs) for window in config.windows()])
        head = 0.001 * jax.random.normal(rngs.params(), table[::-1])
        self.head = weight(head, "embed", "vocab", group="head")

    def __call__(
        self,
        tokens: Array,
        loops: int,
        wanted: tuple[int, ...],
        past: Past | None = None,
        taps: Array | None = None,
        openly: bool = False,
        attend: Attend = plain,
    ) -> tuple[LoopStates, Any]:
        """States after the `wanted` loops, and the cache as `past` now is or, openly, a Trace."""
        rule = RULES[self.config.variant]
        with jax.named_scope("embed"):
            e = self.embed[...][tokens].astype(self.config.dtype)
        places = past.positions if past else jnp.arange(tokens.shape[1])
        rope = rope_tables(places, self.config.head_dim, e.dtype)

        def mix(cache: Cache | None, index: Array, layer: int) -> Mix:
            if past and cache:
                return remember(past, cache, index, layer, attend)
            return attend_openly if openly else without_past(attend)

        def loop(carry: tuple[Array, Cache | None], xs: tuple[Array, Array | None]):
            (h, cache), (index, taps) = carry, xs
            first, streams, weights = index == 0, [], []
            x = rule.start(e, h, first)
            for layer, block in enumerate(self.blocks):
                with jax.named_scope(f"layer_{layer}"):
                    x, query_source = rule.inject(x, h, layer, first)
                    tapped = None if taps is None else taps[layer]
                    x, memory = block(x, query_source, rope, mix(cache, index, layer), tapped)
                cache = memory if past else None
                streams.append(x)
                weights.append(memory)
            h = rms_norm(x)
            layer_norms = None if taps is None else jnp.stack([mean_norm(x) for x in streams])
            trace = Trace(h, jnp.stack(streams), jnp.stack(weights)) if openly else None
            return (h, cache), (h if collect else None, mean_norm(x), layer_norms, trace)

        # The last state is the scan's carry; only other states have to be collected.
        collect = wanted != (loops - 1,)
        (last, extended), (states, norms, layer_norms, trace) = jax.lax.scan(
            _rematerialised(loop, self.config.remat),
            (jnp.zeros_like(e), past.cache if past else None),
            (jnp.arange(loops), taps),
        )
        hidden = states[jnp.array(wanted)] if collect else last[None]
        return LoopStates(hidden, norms, layer_norms), trace if openly else extended


def _rematerialised(loop, remat: str):
    """What the backward pass keeps of each loop, from least to most memory.

    "loop": its start alone. "offload": its matrix products too, in the host's memory. "dots": the
    same on the device. "none" is recomputed: everything is kept.
    """
    if remat == "none":
        return loop
    policies = jax.checkpoint_policies
    policy = {
        "loop": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[PRODUCT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        "dots": policies.save_only_these_names(PRODUCT),
    }[remat]
    return jax.checkpoint(loop, policy=policy, prevent_cse=False)  # a scan prevents it already


@functools.lru_cache
def weights(config: ModelConfig) -> dict[str, Weight]:
    """Shape, axes and optimizer group of every parameter, by name; nothing is computed."""
    return described(nnx.eval_shape(lambda: LoopedTransformer(config, rngs=nnx.Rngs(0))))


def init_params(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 weights: unit-normal embedding, uniform inputs, zero outputs, tiny head."""
    state = nnx.state(LoopedTransformer(config, rngs=nnx.Rngs(key)), nnx.Param)
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    *,
    loops: int | None = None,
    wanted: tuple[int, ...] | None = None,
    taps: Array | None = None,
    attend: Attend = plain,
) -> LoopStates:
    """Run `loops` loops over tokens [B, T] and keep the states after the `wanted` (0-based) ones.

    By default the config's own K, and the last. The state after loop k is what a model of k + 1
    loops ends with, so one pass serves every smaller loop count. Computes in `config.dtype`.
    `taps` [loops, L, 3]: see model/probe.py. `attend`: see model/kernels.py; plain attention runs
    anywhere.
    """
    loops = config.loops if loops is None else loops
    wanted = (loops - 1,) if wanted is None else wanted
    if not wanted or not all(0 <= k < loops for k in wanted):
        raise ValueError(f"wanted={wanted} must name loops 0 to {loops - 1}")
    model = _bind(config, params)
    return model(tokens, loops, wanted, taps=taps, attend=attend)[0]


def shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter lies on `mesh`, by name."""
    specs = sharding.specs(weights(config))
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def on_mesh(
    config: ModelConfig, mesh: Mesh, work: Callable, *, in_specs: tuple, out_specs: Any
) -> Callable:
    """(params, *arguments) -> work(params, *arguments), with every batch device on its own rows.

    For programs without gradients: `work` sees whole weights in the compute type, gathered once,
    and what `in_specs` leave of the other arguments. The `tensor` axis stays automatic in it.
    """
    cuts = sharding.manual_specs(mesh, weights(config))

    def local(shards: Params, *arguments: Any) -> Any:
        # Rounded before they travel: half the bytes, and the products would round them anyway.
        # The TPU's compiler would move both gathers into the loop: K times the messages.
        whole = jax.lax.optimization_barrier(sharding.gather(cast(shards, config.dtype), cuts))
        return jax.lax.optimization_barrier(work(whole, *arguments))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(cuts, *in_specs),
        out_specs=out_specs,
        axis_names=set(sharding.BATCH_AXES),
        check_vma=False,
    )


def make_states(
    config: ModelConfig, mesh: Mesh, loop_counts: tuple[int, ...]
) -> Callable[[Params, Array], Array]:
    """(params, tokens [B, T]) -> states [N, B, T, D] after each of N loop counts, in one pass.

    For programs on the devices of `mesh`, by the attention kernel that suits them.
    """
    attend, wanted = attention_kernels.for_mesh(config, mesh), tuple(k - 1 for k in loop_counts)

    def states(params: Params, tokens: Array) -> Array:
        return forward(
            config, params, tokens, loops=max(loop_counts), wanted=wanted, attend=attend
        ).hidden

    return states


def trace(config: ModelConfig, params: Params, tokens: Array, *, loops: int | None = None) -> Trace:
    """Every state and attention weight of one pass over tokens [B, T]; for few, short rows."""
    loops = config.loops if loops is None else loops
    model = _bind(config, params)
    return model(tokens, loops, (loops - 1,), openly=True)[1]


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
    model = _bind(config, params)
    past = Past(cache, slots, positions, first)
    states, extended = model(tokens, loops, (loops - 1,), past, attend=attend)
    assert extended is not None
    return states.hidden[0], extended


def cast(params: Params, dtype: str) -> Params:
    """Weights in the compute type, for use without gradients: half the memory to read per token."""
    return {name: weight.astype(dtype) for name, weight in params.items()}


def _bind(config: ModelConfig, params: Params) -> LoopedTransformer:
    """The module with these weights in place; costs nothing once traced."""
    skeleton, state = _skeleton(config)
    leaves = [(path, leaf.replace(params[".".join(map(str, path))])) for path, leaf in state]
    return nnx.merge(skeleton, nnx.from_flat_state(leaves))


@functools.lru_cache
def _skeleton(config: ModelConfig):
    model = nnx.eval_shape(lambda: LoopedTransformer(config, rngs=nnx.Rngs(0)))
    skeleton, state = nnx.split(model, nnx.Param)
    return skeleton, tuple(nnx.to_flat_state(state))
