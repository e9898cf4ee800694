"""Checkpoints and tokenizers of PyTorch programs, into ours and back, bit for bit.

    looped-jax convert from-reference RUN_DIR OUT_DIR [--step N] [--tokenizer FILE]
    looped-jax convert to-reference DIR OUT_DIR [--step N]
    looped-jax convert from-nanochat CHECKPOINT_DIR OUT_DIR [--step N] [--tokenizer FILE]
    looped-jax convert to-nanochat DIR BASE_DIR [--step N]
    looped-jax convert from-gpt2 FOLDER|NAME OUT_DIR [--tokenizer FILE]
    looped-jax convert to-gpt2 DIR OUT_DIR [--step N]
    looped-jax convert from-nanogpt ckpt.pt OUT_DIR [--tokenizer FILE]
    looped-jax convert tokenizer tokenizer.pkl tokenizer.json
    looped-jax convert tokenizer tokenizer.json tokenizer.pkl

FOLDER is a GPT-2 of Hugging Face's, NAME one of the hub, as gpt2, which is downloaded.
RUN_DIR and CHECKPOINT_DIR hold `model_{step}.pt`, whole or in shards, and `meta_{step}.json`. What
comes out is a run folder for `looped_jax.load`, the reference's layout again, or a folder for
NANOCHAT_BASE_DIR.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from looped_jax import cli, files
from looped_jax.errors import UserError
from torch_ref.checkpoint_files import ConvertError, check_new
from torch_ref.gpt2_runs import from_gpt2, from_nanogpt, to_gpt2
from torch_ref.nanochat_runs import from_nanochat, to_nanochat
from torch_ref.reference_runs import from_reference, to_reference
from torch_ref.tiktoken_reader import to_tokenizer_json
from torch_ref.tiktoken_writer import to_tokenizer_pickle


def convert_tokenizer(file: Path, out: Path) -> None:
    """A tokenizer.pkl of nanochat as tokenizer.json, or the other way, by the endings."""
    check_new(out)
    match file.suffix, out.suffix:
        case ".pkl", ".json":
            files.write_text(out, to_tokenizer_json(file))
        case ".json", ".pkl":
            files.write_bytes(out, to_tokenizer_pickle(file))
        case _:
            raise ConvertError(f"{file} to {out}: give a .pkl and a .json, or a .json and a .pkl")


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("convert", argv))


def run(args: argparse.Namespace) -> None:
    try:
        print(f"written: {_convert(args)}")
    except ModuleNotFoundError as error:  # of an installation from before GPT-2
        sys.stderr.write(f"error: {error}; pip install 'looped_jax[torch]'\n")
        raise SystemExit(1) from None
    except (UserError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None


def _convert(args: argparse.Namespace) -> str:
    """What was written, and how to open it."""
    if args.command == "tokenizer":
        convert_tokenizer(args.file, args.out)
        return str(args.out)
    if args.command == "to-gpt2":
        folder = to_gpt2(args.run_dir, args.out, step=args.step)
        return f"{folder}; transformers.GPT2LMHeadModel.from_pretrained({str(folder)!r}) opens it"
    if args.command in ("from-gpt2", "from-nanogpt"):
        own = {"tokenizer": args.tokenizer, "dtype": args.dtype}
        if args.command == "from-gpt2":
            step = from_gpt2(args.source, args.out, endpoint=args.endpoint, **own)
        else:
            step = from_nanogpt(args.file, args.out, **own)
        return f"{args.out}, step {step}; looped_jax.load({str(args.out)!r}) opens it"
    if args.command.startswith("from-"):
        read = from_reference if args.command == "from-reference" else from_nanochat
        step = read(
            args.run_dir, args.out, step=args.step, tokenizer=args.tokenizer, dtype=args.dtype
        )
        return f"{args.out}, step {step}; looped_jax.load({str(args.out)!r}) opens it"
    if args.command == "to-reference":
        step = to_reference(args.run_dir, args.out, step=args.step)
        return f"{args.out}/model_{step:06d}.pt and meta_{step:06d}.json"
    folder = to_nanochat(args.run_dir, args.out, step=args.step)
    return f"{folder}; NANOCHAT_BASE_DIR={args.out} opens it with --model-tag={folder.name}"


if __name__ == "__main__":
    main()
