"""One checkpoint judged at many loop counts: what is measured, and where the results go."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from looped_jax import files
from looped_jax.config.registry import TASKS
from looped_jax.data import fetch, pipeline
from looped_jax.data.corpus import Corpus
from looped_jax.data.datasets import DATASETS
from looped_jax.errors import DataError
from looped_jax.evaluation import bits_per_byte, core, perplexity, scoring
from looped_jax.files import check_writable
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.model import attention_kernels
from looped_jax.runtime import distributed, sharding

Scores = dict[str, list[float]]  # metric -> a value per loop count
TOKENS_OF_TEXT = 1_048_576  # scored by default
PROMPTED = ("CORE", "core ", "ppl LAMBADA")  # begin names of what depends on prompts
COLUMNS = 8  # loop counts side by side in a table


class Evaluator:
    """One checkpoint, the loop counts it is judged at, and where results go."""

    def __init__(self, model: TrainedModel, args: argparse.Namespace, log: Callable[[str], None]):
        self.model, self.args, self.log = model, args, log
        self.task = TASKS[model.config.data.task]
        self.folder = Path(args.checkpoint)
        self.loops = args.loops or tuple(
            sorted({*model.config.train.eval_loops, model.config.model.loops})
        )
        self.mesh, self.params = model.mesh, model.params
        self.max_len = args.max_len or scoring.longest_row(model.config.model)
        model.config.model.check_row(self.max_len)
        self.first = jax.process_index() == 0
        if self.first:
            self.out = Path(args.out or self.folder / "evaluation" / f"step_{model.step:06d}")
            check_writable(self.out, "--out")
        else:  # every process computes all results; what the others write is thrown away
            self._thrown_away = tempfile.TemporaryDirectory()
            self.out = Path(self._thrown_away.name)
        if line := attention_kernels.fall_back(model.config.model, self.mesh):
            self.log(line)

    def spans(self, what: str = "") -> scoring.SpanScorer:
        """Scores rows; tells how far it is every few seconds when it is said `what` they are."""
        last = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal last
            if what and (time.monotonic() - last > 5 or done == total):
                last = time.monotonic()
                self.log(f"{what}: {done}/{total} rows")

        return scoring.SpanScorer(
            self.model.config.model,
            self.params,
            self.mesh,
            loop_counts=self.loops,
            batch_size=self.args.batch_size,
            progress=progress,
        )

    def validation(self) -> Scores:
        """What training is judged by, whatever the task."""
        config = self.model.config
        train = dataclasses.replace(
            config.train,
            eval_tokens=self.args.eval_tokens or config.train.eval_tokens,
            batch_size=self.args.batch_size,
        )
        config = dataclasses.replace(config, train=train)
        shard = sharding.data_shard(self.mesh)
        self.log(f"validation: {config.data.task}, {train.eval_tokens:,} targets at most ...")
        judge = self.task(config).judge(config, self.mesh, loop_counts=self.loops, shard=shard)
        scores = judge(self.params)
        return {metric: [of[k] for k in self.loops] for metric, of in scores.items()}

    def bpb(self) -> Scores:
        """Bits per byte of the first file that is trained on, if it is here, and of validation.

        And their perplexity per token. Nats per token of a model without a tokenizer.
        """
        config, vocab_size = self.model.config, self.model.config.model.vocab_size
        tokenizer = self.model.tokenizer if self.model.has_text else None
        unit, metric = (1.0, "bpb") if tokenizer else (math.log(2), "nats")
        corpus = Corpus.to_judge(config.data, self.args.data)
        corpus = dataclasses.replace(corpus, train=corpus.train[:1])
        corpus.check_ids(vocab_size, tokenizer.start if tokenizer else None)
        if not corpus.train:
            self.log(
                f"bpb: train left out; beside {corpus.val[0].path} nothing to train on is here"
            )
        score = scoring.make_score_step(config.model, self.mesh, self.loops)
        shard = sharding.data_shard(self.mesh)
        found = {}
        for name, judged in (("train", corpus.train), ("validation", corpus.val)):
            if not judged:
                continue
            batches = pipeline.val_rows(
                dataclasses.replace(corpus, val=judged),
                tokenizer,
                seq_len=config.model.seq_len,
                batch_size=self.args.batch_size * sharding.batch_devices(self.mesh) // shard.count,
                max_tokens=self.args.eval_tokens or TOKENS_OF_TEXT,
                shard_index=shard.index,
                shard_count=shard.count,
            )
            self.log(f"bpb: {name} {judged[0].name}, {len(batches)} batches ...")
            sizes = bits_per_byte.bytes_of(tokenizer, vocab_size)
            scores = bits_per_byte.bits_per_byte(
                score,
                self.params,
                batches,
                sizes,
                loop_counts=self.loops,
                mesh=self.mesh,
            ).values()
            found[f"{metric} {name}"] = [unit * score for score in scores]
            counts = distributed.process_sum(bits_per_byte.count_targets(batches, vocab_size))
            found[f"ppl {name}"] = [bits_per_byte.perplexity(s, counts, sizes) for s in scores]
        return found

    def ppl(self) -> Scores:
        """Perplexities of LAMBADA's last words and of WikiText-2, which is fetched when absent."""
        tokenizer, spans = self.model.tokenizer, self.spans("ppl")
        given = self.args.wikitext
        lines = perplexity.read_lines(Path(given)) if given else []  # a bad file shows at once
        lambada = self.bundle() / "eval_data" / "language_understanding" / "lambada_openai.jsonl"
        rows = perplexity.last_words(
            tokenizer, lambada, max_len=self.max_len, limit=self.args.max_per_task
        )
        cropped = sum(row.cropped for row in rows)
        self.log(f"ppl: {lambada}, {len(rows):,} last words ({cropped} contexts cropped) ...")
        of_tokens, of_words = perplexity.last_word_perplexities(spans, rows)
        found = {
            "ppl LAMBADA per token": of_tokens.tolist(),
            "ppl LAMBADA per word": of_words.tolist(),
        }
        try:
            path = self.wikitext()
        except DataError as error:
            if self.args.modes:  # asked for by name
                raise
            self.log(f"ppl: WikiText-2 left out: {error}; or give it as --wikitext FILE")
            return found
        lines = lines or perplexity.read_lines(path)
        for name, of in (("all lines", lines), ("text lines", [line for line in lines if line])):
            self.log(f"ppl: {path}, {len(of):,} {name} ...")
            found[f"ppl WikiText-2 {name}"] = perplexity.text_perplexity(
                spans, tokenizer, of, seq_len=self.model.config.model.seq_len
            ).tolist()
        return found

    def core(self) -> Scores:
        """The 22 tasks; finished ones are remembered, so that an interrupted run goes on."""
        model = self.model
        bundle = core.load_bundle(self.bundle())
        state_file = self.out / "core_state.jsonl"
        saved = (self.folder / "checkpoints" / str(model.step)).stat().st_mtime
        # All processes leave out the tasks that the first one has finished.
        done = state_file.read_text("utf-8") if state_file.is_file() else ""
        done, saved = distributed.gather_json([done, saved])[0]
        if done and not self.first:
            state_file.write_text(done, "utf-8")
        results = core.evaluate_tasks(
            bundle,
            model.tokenizer.encode,
            model.tokenizer.bos_id,
            self.spans(),
            loop_counts=self.loops,
            max_len=self.max_len,
            max_per_task=self.args.max_per_task,
            state_file=state_file,
            identity={
                "step": model.step,
                "saved": saved,
                "tokenizer": model.tokenizer.fingerprint(),
            },
            on_progress=lambda task, done, total: self.log(f"core: {task} {done}/{total}"),
        )
        self.log(core.format_table(results, self.loops))
        for index, k in enumerate(self.loops):
            text = core.format_csv(results, index)
            files.write_text(self.out / f"core_loops_{k}.csv", text)
        files.write_text(self.out / "core.csv", core.format_all(results, self.loops))
        found = {f"core {r.name}": r.centered.tolist() for r in results}
        return {"CORE": core.core_mean(results).tolist(), **found}

    def sample(self) -> Scores:
        """Greedy texts at every loop count, on the console and in samples.txt."""
        settings, lines = self.model.config.train, []
        if not settings.sample_prompts:
            self.log("sample: left out; train.sample_prompts is empty")
            return {}
        for k in self.loops:
            texts = self.model.generate(settings.sample_prompts, tokens=24, loops=k)
            lines += [
                f"{k} loops: {prompt!r} → {text!r}"
                for prompt, text in zip(settings.sample_prompts, texts, strict=True)
            ]
        self.log("\n".join(lines))
        files.write_text(self.out / "samples.txt", "\n".join(lines) + "\n")
        return {}

    def bundle(self) -> Path:
        """The CORE bundle: the folder given, data.core_bundle, or the cache's, downloaded once."""
        if self.args.bundle:
            return Path(self.args.bundle)
        of_run = self.model.config.data.core_bundle
        if of_run and (Path(of_run) / "core.yaml").is_file():  # not where a run was moved to
            return Path(of_run)
        return self._fetched(
            lambda: fetch.fetch_bundle(
                core.cached_bundle(), self.args.bundle_url, progress=self._downloaded
            )
        )

    def wikitext(self) -> Path:
        """WikiText-2's test split: the file given, or the cache's, downloaded once."""
        if self.args.wikitext:
            return Path(self.args.wikitext)
        test = DATASETS["wikitext-2"].remote_file("test-00000-of-00001.parquet")
        path = files.default_cache_dir() / "wikitext-2" / test.name
        return self._fetched(lambda: fetch.fetch(test.url, path, check=test.check, retries=2))

    def _fetched(self, get: Callable[[], Path]) -> Path:
        """What `get` finds or downloads; the first process does, while the others wait.

        Raises DataError, in all of them.
        """
        failure = None
        if self.first:
            try:
                get()
            except DataError as error:
                failure = str(error)
        if failure := distributed.gather_json(failure)[0]:
            raise DataError(failure)
        return get()  # at once, where the cache is shared

    def _downloaded(self, have: int, total: int | None) -> None:
        if have == total or have % (16 << 20) < (1 << 20):
            self.log(f"CORE bundle: {have >> 20} of {(total or 0) >> 20} MiB")

    def write(self, scores: Scores) -> None:
        """JSON, TensorBoard and the figure of every metric against the loop count.

        What scores.json holds of this checkpoint, of other metrics or loop counts, stays in it;
        but not scores of prompts that were cropped or drawn otherwise, beside such as are new.
        """
        if not self.first:
            return
        from tensorboardX import SummaryWriter  # both are slow to import

        from looped_jax.plotting import figure_files

        path = self.out / "scores.json"
        checkpoint = self.folder / "checkpoints" / str(self.model.step)
        of = {
            "checkpoint": str(self.args.checkpoint),
            "step": self.model.step,
            "saved": checkpoint.stat().st_mtime,  # a run of the same name may have taken its place
        }
        before = read_scores(path, **of)
        prompts: dict[str, Any] | None = {
            "max_len": self.max_len,
            "max_per_task": self.args.max_per_task,
        }
        known = json.loads(path.read_text("utf-8")).get("prompts") if path.is_file() else None
        if not any(name.startswith(PROMPTED) for name in scores):
            prompts = known
        elif prompts != known:
            others = {n: v for n, v in before[1].items() if not n.startswith(PROMPTED)}
            before = before[0], others
        loops, merged = merge(before, (self.loops, scores))
        report = {
            **of,
            "trained_loops": self.model.config.model.loops,
            "prompts": prompts,
            "loops": list(loops),
            "scores": merged,
        }
        files.write_json(path, report, indent=1)
        with SummaryWriter(str(self.folder / "tensorboard")) as writer:
            for name, values in scores.items():
                for k, value in zip(self.loops, values, strict=True):
                    tag = f"evaluation/{name.replace(' ', '_')}/loops_{k}"
                    writer.add_scalar(tag, value, self.model.step)
        if merged:
            trained = self.model.config.model.loops
            figure = self.task.figure(merged, loops, trained=trained)
            figure_files.save(figure, self.out / "scores")


Found = tuple[Sequence[int], Mapping[str, Sequence[float | None]]]  # loop counts, and scores


def read_scores(path: Path, **of: Any) -> Found:
    """What a scores.json holds `of` this checkpoint. Raises DataError for a damaged one."""
    if not path.is_file():
        return (), {}
    try:
        report = json.loads(path.read_text("utf-8"))
        loops, scores = report["loops"], report["scores"]
        if any(len(values) != len(loops) for values in scores.values()):
            raise ValueError("not a score for every loop count")
        return (loops, scores) if {key: report.get(key) for key in of} == of else ((), {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); move it away") from error


def merge(before: Found, now: Found) -> tuple[list[int], dict[str, list[float | None]]]:
    """Both by metric and loop count, the newer where both have one; None where neither has."""
    loops = sorted({*before[0], *now[0]})
    merged: dict[str, dict[int, float | None]] = {}
    for counts, scores in (before, now):
        for name, values in scores.items():
            merged.setdefault(name, {}).update(zip(counts, values, strict=True))
    return loops, {name: [of.get(k) for k in loops] for name, of in merged.items()}


def table(scores: Scores, loops: Sequence[int]) -> str:
    """A line per metric, a column per loop count; many loop counts in several tables."""
    width = max(map(len, ("loops", *scores)))
    blocks = []
    for some in (slice(at, at + COLUMNS) for at in range(0, len(loops), COLUMNS)):
        lines = [f"{'loops':<{width}}" + "".join(f"{k:>12}" for k in loops[some])]
        for name, values in scores.items():
            lines.append(f"{name:<{width}}" + "".join(f"{cell(v):>12}" for v in values[some]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def cell(value: float) -> str:
    """Four decimals, so that columns line up; large numbers in fewer digits."""
    return f"{value:.4f}" if abs(value) < 100_000 else f"{value:.4g}"
