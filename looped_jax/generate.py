"""Text from a checkpoint: prefill once, then one token at a time from an exact cache.

looped-jax generate --checkpoint runs/FLT_K4_L2_END_D128 --prompt "def " --samples 2
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import jax

import looped_jax
from looped_jax import cli, errors
from looped_jax.inference.decoding import Sampling
from looped_jax.model import attention_kernels
from looped_jax.runtime import distributed, sharding
from looped_jax.runtime.compilation_cache import keep_compiled


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("generate", argv))


def run(args: argparse.Namespace) -> None:
    keep_compiled()
    with errors.printed():
        distributed.initialize()
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        mesh = sharding.mesh_of(args.mesh, default="data=-1" if jax.process_count() > 1 else None)
        model = looped_jax.load(args.checkpoint, step=args.step, mesh=mesh)
        line = attention_kernels.fall_back(model.config.model, model.mesh)
        if line and jax.process_index() == 0:
            print(line, file=sys.stderr)
        prompts = [p for p in args.prompt or [""] for _ in range(args.samples)]
        began, count = time.perf_counter(), 0
        speaks = jax.process_index() == 0
        live = len(prompts) == 1 and sys.stdout.isatty() and speaks
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
    if not speaks:
        return
    if not live:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            print(f"--- {number + 1} of {len(prompts)}\n{prompt}{text}")
    seconds = time.perf_counter() - began
    print(
        f"\n{count} tokens, {count / seconds:.1f} tokens/s, compile time included", file=sys.stderr
    )


if __name__ == "__main__":
    main()
