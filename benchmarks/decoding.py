"""Decoding: tokens per second, cache bytes and drift of logits, for every kind of KV cache.

    python -m benchmarks.decoding --loops 1,3,12

For every K: one token at a time with the exact cache, with the last loop's only, and without a
cache (a full forward pass per token), in turn; medians. Drift is the largest difference of logits
from the full forward pass over the decoded tokens, with random weights of unit scale.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from looped_jax.config.settings import ModelSettings, Settings
from looped_jax.model import kv_cache, loss, transformer
from looped_jax.resolve import resolve


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--loops", default="1,3,12")
    flags.add_argument("--variant", default="FLT")
    flags.add_argument("--layers", type=int, default=3)
    flags.add_argument("--width", type=int, default=192)
    flags.add_argument("--prompt", type=int, default=192)
    flags.add_argument("--tokens", type=int, default=32)
    flags.add_argument("--batch_size", type=int, default=4)
    flags.add_argument("--vocab_size", type=int, default=4096)
    flags.add_argument("--dtype", default="float32")
    flags.add_argument("--rounds", type=int, default=3)
    args = flags.parse_args()
    length = args.prompt + args.tokens
    settings = ModelSettings(
        variant=args.variant, layers=args.layers, width=args.width, seq_len=length, dtype=args.dtype
    )
    model = resolve(Settings(model=settings), vocab_size=args.vocab_size).model
    params = unit_scale(jax.jit(lambda: transformer.init_params(model, jax.random.key(0)))())
    shape = (args.batch_size, length)
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, shape, np.int32)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.variant} L={args.layers} "
        f"D={args.width} prompt {args.prompt} + {args.tokens} tokens, B={args.batch_size} "
        f"V={args.vocab_size} {args.dtype}"
    )
    print("| K | cache | tokens/s | cache bytes per token | largest drift of a logit |")
    print("|---|---|---|---|---|")
    for loops in (int(k) for k in args.loops.split(",")):
        ways = {
            kind: functools.partial(cached, model, params, tokens, args.prompt, loops, kind)
            for kind in kv_cache.CACHE_TYPES
        }
        ways["none"] = functools.partial(recomputed, model, params, tokens, args.prompt, loops)
        logits = {kind: way()[1] for kind, way in ways.items()}  # compiles, too
        seconds: dict[str, list[float]] = {kind: [] for kind in ways}
        for _ in range(args.rounds):
            for kind, way in ways.items():
                seconds[kind].append(way()[0])
        for kind in ways:
            rate = args.batch_size * args.tokens / statistics.median(seconds[kind])
            size = transformer.cache_bytes_per_token(model, loops, kind) if kind != "none" else 0
            drift = np.abs(logits[kind] - logits["none"]).max()
            print(f"| {loops} | {kind} | {rate:,.0f} | {size:,} | {drift:.1e} |", flush=True)


def unit_scale(params: transformer.Params) -> transformer.Params:
    """Random weights whose blocks change the stream: fresh output projections are zero."""
    keys = jax.random.split(jax.random.key(1), len(params))
    return {
        name: jax.random.normal(key, weight.shape) * weight.shape[0] ** -0.5
        for key, (name, weight) in zip(keys, sorted(params.items()), strict=True)
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def _extend(model, loops, kind, params, tokens, positions, cache):
    hidden, cache = transformer.extend(
        model, params, tokens, positions, cache, loops=loops, kind=kind
    )
    return loss.logits(model, params, hidden[:, -1]), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(model, loops, params, tokens, last):
    hidden = transformer.forward(model, params, tokens, loops=loops).hidden[0]
    return loss.logits(model, params, hidden[:, last])


def cached(model, params, tokens, prompt, loops, kind):
    """Seconds for the tokens after the prompt, and their logits [B, tokens, V]."""
    batch, length = tokens.shape
    cache = transformer.empty_cache(model, batch=batch, length=length, loops=loops, kind=kind)
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    _, cache = _extend(model, loops, kind, params, tokens[:, :prompt], positions[:, :prompt], cache)
    jax.block_until_ready(cache)
    start, found = time.perf_counter(), []
    for t in range(prompt, length):
        now = slice(t, t + 1)
        logits, cache = _extend(
            model, loops, kind, params, tokens[:, now], positions[:, now], cache
        )
        found.append(np.asarray(logits))  # a token has to be known before the next one
    return time.perf_counter() - start, np.stack(found, axis=1)


def recomputed(model, params, tokens, prompt, loops):
    start, found = time.perf_counter(), []
    for t in range(prompt, tokens.shape[1]):
        found.append(np.asarray(_forward(model, loops, params, tokens, jnp.asarray(t))))
    return time.perf_counter() - start, np.stack(found, axis=1)


if __name__ == "__main__":
    main()
