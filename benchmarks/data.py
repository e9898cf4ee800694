"""From parquet to the device: tokens per second of the pipeline, against the tokenizer alone.

    python -m benchmarks.data --workers 0,1,2 --seconds 5

The tokenizers library encodes the same documents, on one thread and on all, without reading,
packing or batching. Pipelines with different numbers of worker processes read, tokenize, pack,
batch and place batches on the device. All of them take turns; the table holds medians.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags as absl_flags

from looped_jax.config.settings import DataConfig
from looped_jax.data import corpus, pipeline, tokenizer
from looped_jax.data.corpus import Corpus
from looped_jax.errors import DataError


def encoded(texts: corpus.Corpus, words: tokenizer.Tokenizer, threads: bool) -> Iterator[int]:
    """Endless token counts of row groups, encoded on one thread or on all."""
    groups = corpus.RowGroups(texts.train)
    held = [groups[i] for i in range(min(len(groups), 32))]  # reading is not what is measured
    for documents in itertools.cycle(held):
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads else "false"
        yield sum(map(len, words.encode_documents(documents)))


def piped(batches: Any) -> Iterator[int]:
    """Endless token counts of batches that have arrived on the device."""
    for batch in batches:
        jax.block_until_ready(jax.device_put(batch))
        yield batch.size


def rate(counts: Iterator[int], seconds: float) -> float:
    """Tokens per second over at least `seconds`."""
    start, tokens = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        tokens += next(counts)
    return tokens / passed


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--data", default="builtin", help="folder of parquet shards")
    flags.add_argument("--tokenizer", type=Path, help="a tokenizer.json; one is trained by default")
    flags.add_argument("--workers", default="0,1,2")
    flags.add_argument("--seq_len", type=int, default=1024)
    flags.add_argument("--batch_size", type=int, default=32, help="rows of a batch")
    flags.add_argument("--seconds", type=float, default=5.0, help="of each contender and round")
    flags.add_argument("--rounds", type=int, default=3)
    args = flags.parse_args(argv)
    absl_flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags
    data = DataConfig(path=args.data, tokenizer=str(args.tokenizer) if args.tokenizer else None)
    try:
        texts = Corpus.open(data)
        words = tokenizer.load_tokenizer(data, texts)
    except DataError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    with contextlib.ExitStack() as opened:
        contenders: dict[str, Iterator[int]] = {
            "tokenizers, 1 thread": encoded(texts, words, threads=False),
            "tokenizers, all threads": encoded(texts, words, threads=True),
        }
        for workers in map(int, args.workers.split(",")):
            batches = iter(
                pipeline.train_rows(
                    texts, words, seq_len=args.seq_len, batch_size=args.batch_size, workers=workers
                )
            )
            opened.callback(batches.close)
            name = "a background thread" if workers == 0 else f"{workers} workers"
            contenders[f"pipeline, {name}"] = piped(batches)
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(args.rounds + 1):
            for name, counts in contenders.items():
                measured = rate(counts, args.seconds)
                if number:  # the first round starts workers and fills buffers
                    found[name].append(measured)
            print(f"round {number} of {args.rounds}", flush=True)
    base = statistics.median(found["tokenizers, 1 thread"])
    print(f"\n{os.cpu_count()} cores, {words.vocab_size} entries, rows of {args.seq_len}\n")
    print("| | tokens/s | against tokenizers, 1 thread |\n|---|---|---|")
    for name, rates in found.items():
        median = statistics.median(rates)
        print(f"| {name} | {median:,.0f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
