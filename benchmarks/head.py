"""Head and loss in chunks of tokens against all logits at once: memory and speed.

    python -m benchmarks.head --vocab_size 151669 --width 384 --tokens 2048

Loss and its gradients by head and states, as training takes them: in one pass, the losses'
weights being known, and beside it in two, where they are not; in turn, medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from looped_jax.config.settings import ModelSettings, Settings
from looped_jax.model import loss, transformer
from looped_jax.resolve import resolve


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"vocab_size": 151_669, "width": 384, "tokens": 2048, "rounds": 5}.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--chunks", default="128,512,2048", help="tokens at once")
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = flags.parse_args()
    model = ModelSettings(layers=1, width=args.width, seq_len=args.tokens, dtype=args.dtype)
    config = resolve(Settings(model=model), vocab_size=args.vocab_size).model
    keys = jax.random.split(jax.random.key(0), 3)
    head = 0.02 * jax.random.normal(keys[0], (args.width, config.padded_vocab))
    hidden = jax.random.normal(keys[1], (1, 1, args.tokens, args.width), args.dtype)
    targets = jax.random.randint(keys[2], (1, args.tokens), 0, args.vocab_size)

    others = transformer.init_params(config, keys[0])

    def one_pass(chunk: int, head: jax.Array, hidden: jax.Array) -> jax.Array:
        chunked = dataclasses.replace(config, loss_chunk=chunk)
        weights = jnp.full((1,), 1 / args.tokens)
        return loss.weighted_losses(chunked, others | {"head": head}, hidden, targets, weights)[0]

    def two_passes(chunk: int, head: jax.Array, hidden: jax.Array) -> jax.Array:
        chunked = dataclasses.replace(config, loss_chunk=chunk)
        return loss.token_losses(chunked, others | {"head": head}, hidden, targets).mean()

    chunks = [*(int(c) for c in args.chunks.split(",") if int(c) < args.tokens), args.tokens]
    ways = {"one": one_pass, "two": two_passes}
    programs = {}
    for chunk in chunks:
        for way, objective in ways.items():
            step = jax.jit(jax.value_and_grad(functools.partial(objective, chunk), argnums=(0, 1)))
            programs[chunk, way] = step.lower(head, hidden).compile()
            jax.block_until_ready(programs[chunk, way](head, hidden))
    seconds: dict[tuple[int, str], list[float]] = {case: [] for case in programs}
    for _ in range(args.rounds):
        for case, program in programs.items():
            start = time.perf_counter()
            value = jax.block_until_ready(program(head, hidden))[0]
            seconds[case].append(time.perf_counter() - start)
            assert jnp.isfinite(value)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: D={args.width} "
        f"V={args.vocab_size:,}, {args.tokens:,} tokens, {args.dtype}"
    )
    print("| tokens at once | passes | temporary MiB | ms | against all at once, two passes |")
    print("|---|---|---|---|---|")
    whole = statistics.median(seconds[args.tokens, "two"])
    for (chunk, way), taken in seconds.items():
        median = statistics.median(taken)
        temporary = programs[chunk, way].memory_analysis().temp_size_in_bytes / 2**20
        name = "all" if chunk == args.tokens else f"{chunk:,}"
        print(f"| {name} | {way} | {temporary:,.0f} | {1e3 * median:,.0f} | {median / whole:.2f} |")


if __name__ == "__main__":
    main()
