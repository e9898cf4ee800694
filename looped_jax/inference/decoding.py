"""Decoding: prefill once, then one token at a time from an exact cache, on any mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ArgumentError
from looped_jax.model import attention_kernels, loss, transformer
from looped_jax.model import kv_cache as caches
from looped_jax.model.kv_cache import Cache
from looped_jax.model.transformer import Params
from looped_jax.runtime import sharding

Array = jax.Array


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 leave all in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("temperature", self.temperature, 0, float("inf")),
            ("top_k", self.top_k, 0, float("inf")),
            ("top_p", self.top_p, 0, 1),
        ):
            if not low <= value <= high:
                raise ArgumentError(f"{name}={value} is out of range; give {low} to {high}")


GREEDY = Sampling()


def generate_tokens(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    loops: int | None = None,
    sampling: Sampling = GREEDY,
    draws: Sequence[int] | None = None,
    cache: str = "exact",
    mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
    """`tokens` times the next token [B] of every prompt, each a non-empty list of ids.

    Prompts of different lengths are padded, and each gets what it would get alone. The random
    numbers of a row depend on the seed, its entry in `draws` (0 by default) and the position, not
    on its neighbours. Rows are cut over the batch devices of `mesh`, weights and cache over
    `tensor`; by default one device does it all. Of several processes all must call it, alike. One
    compile per bucket of prompt length for prefill, one for decode.
    """
    for name, value in (("loops", loops), ("tokens", tokens)):
        if value is not None and value < 1:
            raise ArgumentError(f"{name}={value} must be a whole number from 1")
    loops, mesh = loops or config.loops, mesh or sharding.one_device()
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise ArgumentError("every prompt must hold at least one token; begin with the start token")
    config.check_row(int(lengths.max()) + tokens - 1)  # the last is not looked at
    padded = np.zeros((len(prompts), _bucket(lengths.max())), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    length = _bucket(padded.shape[1] + tokens)
    draw = np.array(draws or [0] * len(prompts), np.uint32)
    starts, last, rows = (
        sharding.put(sharding.fill_rows(array, mesh), mesh, P(sharding.BATCH_AXES))
        for array in (padded, lengths - 1, draw)
    )
    steps = Steps.of(config, mesh, loops, cache)
    kv_cache = steps.empty(len(starts), length)
    weights = steps.cast(params)
    chosen = (sampling.seed, sampling.temperature, sampling.top_k, sampling.top_p)
    fresh, position, kv_cache = steps.prefill(weights, kv_cache, starts, last, rows, *chosen)
    for remaining in range(tokens, 0, -1):
        yield np.asarray(fresh)[: len(prompts)]
        if remaining > 1:
            fresh, position, kv_cache = steps.decode(
                weights, kv_cache, fresh, position, rows, *chosen
            )


@dataclass(frozen=True)
class Steps:
    """The jitted programs of one model, mesh, loop count and kind of cache.

    empty: (rows, length) -> a cache; cast: params -> weights in the compute type
    prefill: (weights, cache, prompts [B, P], last [B], draws [B], seed, temperature, top_k, top_p)
    -> (first new token [B], its position [B], cache); `last` is each prompt's last position
    decode: the same of one token [B] at a position [B]. Both give the cache's memory away.
    """

    empty: Callable[[int, int], Cache]
    cast: Callable[[Params], Params]
    prefill: jax.stages.Wrapped
    decode: jax.stages.Wrapped

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, config: ModelConfig, mesh: Mesh, loops: int, kind: str) -> Steps:
        """Rows over the batch axes, heads over `tensor`. Raises ArgumentError for unknown kinds."""
        attend = attention_kernels.for_mesh(config, mesh)
        rows, cached = P(sharding.BATCH_AXES), P(None, sharding.BATCH_AXES)
        made = functools.partial(transformer.empty_cache, config, loops=loops, kind=kind)
        of_cache = {
            name: NamedSharding(mesh, caches.spec(name))
            for name in jax.eval_shape(lambda: made(batch=1, length=1))
        }

        def extend(params, cache, tokens, positions, index, draws, seed, *sampling, first):
            hidden, cache = transformer.extend(
                config, params, tokens, positions, cache,
                loops=loops, kind=kind, first=first, attend=attend,
            )  # fmt: skip
            hidden = jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]
            position = jnp.take_along_axis(positions, index[:, None], axis=1)[:, 0] + 1
            keys = _row_keys(seed, draws)
            return _choose(config, params, hidden, position, keys, sampling), position, cache

        def prefill(params, cache: Cache, prompts: Array, last: Array, *rest):
            positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
            return extend(params, cache, prompts, positions, last, *rest, first=True)

        def decode(params, cache: Cache, token: Array, position: Array, *rest):
            only = jnp.zeros_like(position)
            return extend(
                params, cache, token[:, None], position[:, None], only, *rest, first=False
            )

        def program(step: Callable) -> jax.stages.Wrapped:
            return jax.jit(
                transformer.on_mesh(
                    config,
                    mesh,
                    step,
                    in_specs=(cached, rows, rows, rows, P(), P(), P(), P()),
                    out_specs=(rows, rows, cached),
                    gathered=True,
                ),
                # Every process reads all tokens.
                out_shardings=(NamedSharding(mesh, P()), NamedSharding(mesh, rows), of_cache),
                donate_argnums=1,
            )

        @functools.partial(jax.jit, static_argnums=(0, 1), out_shardings=of_cache)
        def empty(batch: int, length: int) -> Cache:
            return made(batch=batch, length=length)

        # Gathered once, not for every token.
        where = transformer.whole_shardings(config, mesh)
        to_type = jax.jit(
            functools.partial(transformer.cast, dtype=config.dtype), out_shardings=where
        )

        def cast(params: Params) -> Params:
            return to_type(jax.device_put(params, transformer.shardings(config, mesh)))

        return cls(empty, cast, program(prefill), program(decode))


def _bucket(length: int) -> int:
    """Lengths are rounded up to 16, 32, 64, …, so that few shapes are compiled."""
    return max(16, 1 << (int(length) - 1).bit_length())


def _choose(config: ModelConfig, params: Params, hidden: Array, position, keys, sampling) -> Array:
    logits = loss.logits(config, params, hidden)
    keys = jax.vmap(jax.random.fold_in)(keys, position)
    return jax.vmap(sample, in_axes=(0, 0, None, None, None))(logits, keys, *sampling)


def sample(logits: Array, key: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """One token id from logits [V]: the top_k likeliest, of these the fewest that hold top_p."""
    order = jnp.argsort(-logits)
    scaled = logits[order] / jnp.maximum(temperature, 1e-6)
    rank = jnp.arange(len(logits))
    kept = (top_k == 0) | (rank < top_k)
    share = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf))
    kept &= jnp.cumsum(share) - share < top_p
    kept |= rank == 0
    drawn = jax.random.categorical(key, jnp.where(kept, scaled, -jnp.inf))
    return order[jnp.where(temperature == 0, 0, drawn)].astype(jnp.int32)


def _row_keys(seed: Array, draws: Array) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), draws)
