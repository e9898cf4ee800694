"""Text from a checkpoint: prefill once, then one token at a time from an exact cache.

looped-jax generate --checkpoint runs/FLT_K4_L2_END_D128 --prompt "def" --samples 2
looped-jax generate --checkpoint runs/FLT_K4_L2_END_D128 --interactive
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence

import jax

import looped_jax
from looped_jax import cli, errors
from looped_jax.errors import ArgumentError
from looped_jax.inference.decoding import Sampling
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.model import attention_kernels
from looped_jax.runtime import distributed, sharding
from looped_jax.runtime.compilation_cache import keep_compiled


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("generate", argv))


def run(args: argparse.Namespace) -> None:
    keep_compiled()
    with errors.printed(), distributed.joined():
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        mesh = sharding.mesh_of(args.mesh, default="data=-1" if jax.process_count() > 1 else None)
        model = looped_jax.load(args.checkpoint, step=args.step, mesh=mesh)
        line = attention_kernels.fall_back(model.config.model, model.mesh)
        if line and jax.process_index() == 0:
            print(line, file=sys.stderr)
        if args.interactive:
            check_interactive(args)
            talk(model, args, sampling)
        else:
            write(model, args, sampling)


def write(model: TrainedModel, args: argparse.Namespace, sampling: Sampling) -> None:
    """All texts of all prompts; a single one as it is made where somebody looks."""
    prompts = [p for p in args.prompt or [""] for _ in range(args.samples)]
    began, count = time.perf_counter(), 0
    speaks = jax.process_index() == 0
    live = len(prompts) == 1 and sys.stdout.isatty() and speaks
    texts = [""] * len(prompts)
    if speaks:
        warn_of_length(model, prompts, args.tokens)
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


def talk(model: TrainedModel, args: argparse.Namespace, sampling: Sampling) -> None:
    """A text for every line that comes in; the line loops=8 sets the loop count of those after."""
    loops = args.loops or model.config.model.loops
    print(f"a line is a prompt; loops=8 sets the loops, {loops} now; Ctrl-D ends", file=sys.stderr)
    for line in sys.stdin:
        prompt = line.rstrip("\n")
        if given := re.fullmatch(r"\s*loops\s*=\s*(\d+)\s*", prompt):
            loops = int(given[1]) or loops
            print(f"{loops} loops", file=sys.stderr)
            continue
        warn_of_length(model, [prompt], args.tokens)
        print(prompt, end="", flush=True)
        for (piece,) in model.stream(
            [prompt], tokens=args.tokens, loops=loops, sampling=sampling, cache=args.cache
        ):
            print(piece or "", end="", flush=True)
        print(flush=True)


def check_interactive(args: argparse.Namespace) -> None:
    """Raise ArgumentError for what --interactive would have to ignore."""
    given = {"--prompt": args.prompt, "--samples": args.samples > 1}
    if wrong := [flag for flag, value in given.items() if value]:
        raise ArgumentError(f"--interactive reads prompts line by line; leave {wrong[0]} out")
    if jax.process_count() > 1:
        raise ArgumentError(
            f"--interactive is for one process, and these are {jax.process_count()}; give --prompt"
        )


def warn_of_length(model: TrainedModel, prompts: Sequence[str], tokens: int) -> None:
    """Say on standard error that a text goes on where training has never been."""
    longest = tokens + max(len(model.tokenizer.prompt(prompt)) for prompt in prompts)
    if longest > (trained := model.config.model.seq_len):
        print(
            f"warning: up to {longest} tokens from a model that was trained on rows of {trained}; "
            "what comes after them may fall apart",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
