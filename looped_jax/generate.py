"""Text from a checkpoint: prefill once, then one token at a time from an exact cache.

python -m looped_jax.generate --checkpoint runs/FLT_K4_L2_END_D128 --prompt "def " --samples 2
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from looped_jax.config import ModelConfig
from looped_jax.model import cache as caches
from looped_jax.model import loss, transformer
from looped_jax.model.cache import Cache
from looped_jax.model.transformer import Params

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
                raise ValueError(f"{name}={value} is out of range; give {low} to {high}")


GREEDY = Sampling()


def stream(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    loops: int | None = None,
    sampling: Sampling = GREEDY,
    draws: Sequence[int] | None = None,
    cache: str = "exact",
) -> Iterator[np.ndarray]:
    """`tokens` times the next token [B] of every prompt, each a non-empty list of ids.

    Prompts of different lengths are padded, and each gets what it would get alone. The random
    numbers of a row depend on the seed, its entry in `draws` (0 by default) and the position, not
    on its neighbours. One compile per bucket of prompt length for prefill, one for decode.
    """
    loops = loops or config.loops
    lengths = np.array([len(prompt) for prompt in prompts])
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("every prompt must hold at least one token; begin with the start token")
    padded = np.zeros((len(prompts), _bucket(lengths.max())), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    length = _bucket(padded.shape[1] + tokens)
    memory = caches.empty(config, batch=len(prompts), length=length, loops=loops, kind=cache)
    chosen = (sampling.temperature, sampling.top_k, sampling.top_p)
    params = transformer.cast(params, config.dtype)
    keys = _row_keys(sampling.seed, jnp.array(draws or [0] * len(prompts), jnp.uint32))
    positions = jnp.array(lengths - 1)
    step = functools.partial(_prefill, config, loops, cache)
    fresh: Array | np.ndarray = padded
    for _ in range(tokens):
        fresh, positions, memory = step(params, memory, fresh, positions, keys, *chosen)
        step = functools.partial(_decode, config, loops, cache)
        yield np.asarray(fresh)


def _bucket(length: int) -> int:
    """Lengths are rounded up to 16, 32, 64, …, so that few shapes are compiled."""
    return max(16, 1 << (int(length) - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _prefill(config, loops, kind, params, memory: Cache, prompts, last, keys, *sampling):
    """First new token of padded prompts [B, P] whose last tokens are at `last` [B]."""
    places = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    hidden, memory = transformer.extend(
        config, params, prompts, places, memory, loops=loops, kind=kind
    )
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return _choose(config, params, hidden, last + 1, keys, sampling), last + 1, memory


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(config, loops, kind, params, memory: Cache, token, position, keys, *sampling):
    """Next token after `token` [B] at `position` [B]; the cache is updated in place."""
    hidden, memory = transformer.extend(
        config, params, token[:, None], position[:, None], memory, loops=loops, kind=kind
    )
    return _choose(config, params, hidden[:, 0], position + 1, keys, sampling), position + 1, memory


def _choose(config: ModelConfig, params: Params, hidden: Array, position, keys, sampling) -> Array:
    logits = loss.logits(config, params["head"], hidden)
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


@jax.jit
def _row_keys(seed: Array, draws: Array) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), draws)


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(prog="python -m looped_jax.generate", description=__doc__)
    flags.add_argument("--checkpoint", required=True, help="folder of a run")
    flags.add_argument("--step", type=int, help="checkpoint of this step; the newest by default")
    flags.add_argument("--prompt", action="append", help="repeat for several; none: from nothing")
    flags.add_argument("--samples", type=int, default=1, help="texts per prompt")
    flags.add_argument("--tokens", type=int, default=64, help="new tokens at most")
    flags.add_argument("--loops", type=int, help="loop count; the trained one by default")
    flags.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    flags.add_argument("--top_k", type=int, default=0)
    flags.add_argument("--top_p", type=float, default=1.0)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--cache", choices=caches.KINDS, default="exact")
    args = flags.parse_args(argv)

    import looped_jax
    from looped_jax.checkpoint import CheckpointError
    from looped_jax.compilation import keep_compiled

    keep_compiled()
    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        model = looped_jax.load(args.checkpoint, step=args.step)
        prompts = [p for p in args.prompt or [""] for _ in range(args.samples)]
        began, count = time.perf_counter(), 0
        live = len(prompts) == 1 and sys.stdout.isatty()
        texts = [""] * len(prompts)
        if live:
            print(prompts[0], end="", flush=True)
        for pieces in model.stream(
            prompts,
            tokens=args.tokens,
            loops=args.loops,
            sampling=sampling,
            draws=[i % args.samples for i in range(len(prompts))],
            cache=args.cache,
        ):
            count += sum(piece is not None for piece in pieces)
            texts = [text + (piece or "") for text, piece in zip(texts, pieces, strict=True)]
            if live:
                print(pieces[0] or "", end="", flush=True)
    except (CheckpointError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    if not live:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            print(f"--- {number + 1} of {len(prompts)}\n{prompt}{text}")
    seconds = time.perf_counter() - began
    print(
        f"\n{count} tokens, {count / seconds:.1f} tokens/s, compile time included", file=sys.stderr
    )


if __name__ == "__main__":
    main()
