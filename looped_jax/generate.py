"""Text from a checkpoint: prefill once, then one token at a time from an exact cache.

python -m looped_jax.generate --checkpoint runs/FLT_K4_L2_END_D128 --prompt "def " --samples 2
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import jax

from looped_jax import cli, errors
from looped_jax.inference.decoding import Sampling
from looped_jax.model import attention_kernels
from looped_jax.model import kv_cache as caches
from looped_jax.runtime import sharding


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
    flags.add_argument("--cache", choices=caches.CACHE_TYPES, default="exact")
    flags.add_argument("--mesh", help="devices by axis, as data=2,tensor=4; one device by default")
    cli.add_import(flags)
    args = flags.parse_args(argv)

    import looped_jax
    from looped_jax.runtime import distributed
    from looped_jax.runtime.compilation_cache import keep_compiled

    keep_compiled()
    with errors.printed():
        cli.import_own(args.imports)
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
