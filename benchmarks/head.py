"""Head and loss in chunks of tokens against all logits at once: memory and speed, both ways.

    python -m benchmarks.head --vocab_size 151669 --width 384 --tokens 2048

Loss and its gradients by head and states, as training takes them; in turn, medians.
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

    def objective(chunk: int, head: jax.Array, hidden: jax.Array) -> jax.Array:
        chunked = dataclasses.replace(config, loss_chunk=chunk)
        return loss.token_losses(chunked, others | {"head": head}, hidden, targets).mean()

    chunks = [*(int(c) for c in args.chunks.split(",") if int(c) < args.tokens), args.tokens]
    programs = {}
    for chunk in chunks:
        step = jax.jit(jax.value_and_grad(functools.partial(objective, chunk), argnums=(0, 1)))
        programs[chunk] = step.lower(head, hidden).compile()
        jax.block_until_ready(programs[chunk](head, hidden))
    seconds: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    for _ in range(args.rounds):
        for chunk, program in programs.items():
            start = time.perf_counter()
            value = jax.block_until_ready(program(head, hidden))[0]
            seconds[chunk].append(time.perf_counter() - start)
            assert jnp.isfinite(value)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: D={args.width} "
        f"V={args.vocab_size:,}, {args.tokens:,} tokens, {args.dtype}"
    )
    print("| tokens at once | temporary MiB | ms | against all at once |\n|---|---|---|---|")
    whole = statistics.median(seconds[args.tokens])
    for chunk in chunks:
        median = statistics.median(seconds[chunk])
        temporary = programs[chunk].memory_analysis().temp_size_in_bytes / 2**20
        name = "all" if chunk == args.tokens else f"{chunk:,}"
        print(f"| {name} | {temporary:,.0f} | {1e3 * median:,.0f} | {median / whole:.2f} |")


if __name__ == "__main__":
    main()
