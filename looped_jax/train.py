"""Pretraining, read top to bottom: mesh → data → state → restore → steps.

python -m looped_jax.train --config configs/flt.py:tiny --config.train.steps=100
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from looped_jax import errors, files
from looped_jax.cli import define_config, parse_flags
from looped_jax.config import Config, micro_batches
from looped_jax.data import corpus, pipeline, tokenizer
from looped_jax.data.packing import remap_positions
from looped_jax.errors import TrainingError
from looped_jax.evaluation import bits_per_byte, scoring
from looped_jax.files import default_cache_dir
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.model import attention_kernels, flops
from looped_jax.resolve import resolve
from looped_jax.runtime import distributed, hardware, sharding
from looped_jax.runtime.compilation_cache import keep_compiled
from looped_jax.runtime.profiler import Profile
from looped_jax.training import checkpoint, optim, resumption, train_step
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.metric_log import Smoothed
from looped_jax.training.progress import Console, memory_of
from looped_jax.training.report import NonFiniteLossError, Report

CONFIG = define_config()
PROFILE_STEPS = flags.DEFINE_string("profile_steps", None, "trace these steps, as 10:13")


def train(
    config: Config, *, command: str = "the same command", profile_steps: str | None = None
) -> Path:
    """Train, or continue, the run that `config` describes; returns its folder.

    `profile_steps` "10:13" writes a trace of these steps beside the TensorBoard curves.

    Raises ConfigError, DataError, CheckpointError or TrainingError, each with a one-line message.
    """
    with contextlib.ExitStack() as opened:
        return _train(config, command, profile_steps, opened)


def _train(
    config: Config, command: str, profile_steps: str | None, opened: contextlib.ExitStack
) -> Path:
    # ---- devices and data -----------------------------------------------------------------------
    distributed.check_joined()
    mesh = sharding.make_mesh(config.mesh)
    share, shares = sharding.batch_share(mesh)  # which part of every batch this process feeds
    texts = corpus.open_corpus(
        config.data.path,
        val_shard=config.data.val_shard,
        train_shards=config.data.train_shards,
        cache_dir=default_cache_dir(),
    )
    words = tokenizer.load_tokenizer(
        config.data.tokenizer,
        corpus=texts,
        vocab_size=config.data.tokenizer_vocab_size,
        bos_token=config.data.bos_token,
        cache_dir=default_cache_dir(),
    )

    # ---- everything the run is, now that the vocabulary is known --------------------------------
    config = with_horizon(resolve(config, vocab_size=words.vocab_size))
    model, settings = config.model, config.train
    assert settings.run_dir and settings.steps and model.width
    accumulated = micro_batches(config, devices=sharding.batch_devices(mesh))
    attention = attention_kernels.check(model, hardware.attention_support(mesh))
    optimizer = optim.make_optimizer(config, mesh)
    abstract_state = train_step.abstract(config, optimizer, mesh)
    identity = json_round_trip(
        checkpoint.identity(config, data=texts.identity(), tokenizer=words.identity(), hosts=shares)
    )
    run_dir = Path(settings.run_dir)
    checkpoints = opened.enter_context(
        Checkpoints(
            run_dir,
            keep=settings.keep,
            keep_every=settings.keep_every,
            keep_best=settings.keep_best,
        )
    )
    first_process = jax.process_index() == 0
    say = Console(quiet=not first_process)
    say(config.describe())
    say(str(attention))
    if jax.process_count() > 1:
        say(
            f"{jax.process_count()} processes, {shares} of which read different text; if one dies, "
            f"the others end within a minute or so, and to go on: {command}"
        )

    # ---- rows of tokens: [micro-batches, rows, T + 1] per step ----------------------------------
    rows_per_step = settings.tokens_per_step // model.seq_len // shares
    rows = iter(
        pipeline.train_rows(
            texts,
            words,
            seq_len=model.seq_len,
            batch_size=rows_per_step,
            process_index=share,
            process_count=shares,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
        )
    )
    opened.callback(rows.close)
    loop_counts = tuple(sorted({*settings.eval_loops, model.loops}))
    val_rows = pipeline.val_rows(
        texts,
        words,
        seq_len=model.seq_len,
        batch_size=settings.batch_size * sharding.batch_devices(mesh) // shares,
        max_tokens=settings.eval_tokens,
        process_index=share,
        process_count=shares,
    )

    # ---- fresh weights, or the last checkpoint --------------------------------------------------
    start, smoothed, best = checkpoints.latest() or 0, Smoothed(), math.inf
    if start:
        meta = checkpoints.meta(start)
        hosts = len(meta["positions"])
        if hosts != shares and config.data.follow_hosts:
            meta["identity"]["data"]["hosts"] = shares
        before = meta["identity"]["train"]["steps"]
        if before != settings.steps:
            resumption.check_extends(config, before, start)
            say(f"{run_dir} goes on to step {settings.steps}, not {before}")
            meta["identity"]["train"]["steps"] = settings.steps
        checkpoint.check_identity(meta["identity"], identity, run_dir=settings.run_dir)
        current = checkpoints.restore(start, abstract_state)
        if hosts == shares:
            rows.set_state(meta["positions"][share])
        else:
            groups = len(corpus.RowGroups(texts.train))
            rows.set_state(remap_positions(meta["positions"], groups, index=share, count=shares))
            say(f"text goes on where {hosts} hosts left it, now in the order of {shares}")
        smoothed, best = Smoothed(meta["smoothed_loss"]), meta["best_bpb"] or math.inf
        say(f"continuing {run_dir} from step {start}")
    else:
        current = train_step.create(config, optimizer, mesh)
        if settings.init_from:
            current = resumption.initialized(settings, current, abstract_state)
            say(f"starting with the weights of {settings.init_from}")
        if first_process:
            save_description(run_dir, config, words)
    if start == settings.steps:
        say(f"{run_dir} is complete: {start} steps, bits per byte {meta['bpb']}")
        return run_dir

    # ---- compile once, and say what it takes ----------------------------------------------------
    place = sharding.batch_sharding(mesh)
    batch_shape = (accumulated, rows_per_step * shares // accumulated, model.seq_len + 1)
    batch = jax.ShapeDtypeStruct(batch_shape, np.int32, sharding=place)

    began = time.perf_counter()
    step_programs = {
        look: train_step.make_train_step(config, optimizer, mesh, inside=look)
        .lower(abstract_state, batch)
        .compile()
        for look in ((False, True) if settings.inside_every else (False,))
    }
    costs = flops.count(model)
    peak, peak_source = hardware.device_peak_flops(jax.local_devices()[0])
    say(
        f"{costs.parameters:,} parameters, {costs.looped:,} of them looped {model.loops} times; "
        f"{costs.flops / 1e6:.1f} MFLOP per token (the reference counts "
        f"{costs.reference_flops / 1e6:.1f}); {settings.steps} steps of "
        f"{settings.tokens_per_step:,} tokens on {mesh.size} {jax.devices()[0].device_kind} "
        f"of {peak / 1e12:.2f} TFLOP/s ({peak_source})"
    )
    say(f"step compiled in {time.perf_counter() - began:.1f} s; {memory_of(step_programs[False])}")
    score = scoring.make_score_step(config.model, mesh, loop_counts)
    seen = bits_per_byte.count_targets(val_rows, words.vocab_size)
    unigram = bits_per_byte.unigram_bits_per_byte(distributed.process_sum(seen), words.token_bytes)

    # ---- the steps ------------------------------------------------------------------------------
    report = Report(
        config, run_dir, start=start, smoothed=smoothed, peak_flops=peak * mesh.size, say=say
    )
    opened.callback(report.close)
    stop = distributed.StopSignal()
    profile = Profile(profile_steps, run_dir / "tensorboard")
    opened.callback(profile.close)
    scores: dict[int, float] = {}
    try:
        for done in range(start + 1, settings.steps + 1):
            began = time.perf_counter()
            batch = next(rows).reshape(accumulated, -1, model.seq_len + 1)
            waited = time.perf_counter() - began
            tokens = jax.make_array_from_process_local_data(place, batch)
            profile.before(done)
            with jax.profiler.StepTraceAnnotation("train", step_num=done):
                step_program = step_programs[due(done, settings.inside_every)]
                current, metrics = step_program(current, tokens)
            report.submit(done, metrics, waited)
            if trace := profile.after(done, metrics):
                say(f"profile: {trace}")

            last, stopping = done == settings.steps, stop.requested(done)
            evaluated = last or due(done, settings.eval_every)
            if evaluated:
                report.flush()
                scores = bits_per_byte.bits_per_byte(
                    score,
                    train_step.evaluation_params(current),
                    val_rows,
                    words.token_bytes,
                    loop_counts=loop_counts,
                    mesh=mesh,
                )
                best = min(best, scores[model.loops])
                report.record(done, {f"val/bpb_loops_{k}": v for k, v in scores.items()})
                say(f"step {done} validation bits per byte: {describe_scores(scores, unigram)}")
                report.pace.skip()
            if last or stopping or due(done, settings.save_every):
                report.flush()
                meta = {
                    "step": done,
                    "positions": positions_of_all(share, rows.get_state()),
                    "smoothed_loss": report.smoothed.state(),
                    "best_bpb": best if math.isfinite(best) else None,
                    "bpb": scores,
                    "score": scores.get(model.loops)
                    if due(done, settings.eval_every) or last
                    else None,
                    "config": config.to_dict(),
                    "identity": identity,
                }
                checkpoints.save(done, current, meta)
                report.pace.skip()
            if stopping and not last:
                say(f"stopped by a signal after step {done}, saved in {run_dir}; go on: {command}")
                break
    except NonFiniteLossError as error:
        checkpoints.wait()
        raise TrainingError(
            f"stopped at step {error.step}: {error}. The last good checkpoint is step "
            f"{checkpoints.latest() or 'none'} in {run_dir}; to go on from it: {command}. If it "
            "happens again, lower the learning rates or optim.grad_clip_norm in a new train.run_dir"
        ) from None
    checkpoints.wait()
    if done == settings.steps:
        seconds = report.pace.elapsed()
        say(f"{done - start} steps in {seconds:.0f} s; curves: tensorboard --logdir {run_dir}")
        say("\n".join(report.summary()))
        if settings.sample_tokens:  # by all processes together
            params = train_step.evaluation_params(current)
            print_samples(TrainedModel(config, params, words, step=done, mesh=mesh), say)
    return run_dir


# ---- what the run above uses ---------------------------------------------------------------------


def with_horizon(config: Config) -> Config:
    """Set train.steps to 20 tokens per parameter unless it is given."""
    if config.train.steps is not None:
        return config
    tokens = 20 * flops.count(config.model).parameters
    steps = max(1, tokens // config.train.tokens_per_step)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def save_description(run_dir: Path, config: Config, words: tokenizer.Tokenizer) -> None:
    """Config and tokenizer beside the checkpoints, so that the folder stands alone."""
    files.write_text(run_dir / "config.json", json.dumps(config.to_dict(), indent=1))
    files.write_text(run_dir / "tokenizer.json", words.to_json())


def positions_of_all(share: int, position: dict[str, Any]) -> list[dict[str, Any]]:
    """Data positions by share; processes that feed the same share stand at the same place."""
    return [where for _, where in sorted(dict(distributed.gather_json([share, position])).items())]


def json_round_trip(value: Any) -> Any:
    """As it will come back from disk, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value))


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def describe_scores(scores: dict[int, float], unigram: float) -> str:
    counts = ", ".join(f"{value:.4f} at {k} loops" for k, value in scores.items())
    return f"{counts} (best unigram model of these tokens: {unigram:.4f})"


def print_samples(trained: TrainedModel, say: Console) -> None:
    settings = trained.config.train
    texts = trained.generate(settings.sample_prompts, tokens=settings.sample_tokens)
    for prompt, text in zip(settings.sample_prompts, texts, strict=True):
        say(f"sample: {prompt!r} → {text!r}")


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    command = shlex.join([Path(sys.executable).name, "-m", "looped_jax.train", *sys.argv[1:]])
    with errors.printed():
        keep_compiled()
        distributed.initialize()
        config = Config.from_dict(CONFIG.value)
        train(config, command=command, profile_steps=PROFILE_STEPS.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
