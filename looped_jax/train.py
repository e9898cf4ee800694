"""Train a model, or continue its run. Top to bottom: mesh → rows → state → restore → steps.

looped-jax train --config flt:tiny --config.train.steps=100
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from looped_jax import cli, errors
from looped_jax.config.registry import TASKS
from looped_jax.config.resolved import Config, micro_batches
from looped_jax.config.settings import PARAMETER_COUNTS, Settings
from looped_jax.errors import CheckpointError, TrainingError
from looped_jax.model import attention_kernels, flops, parameter_counts
from looped_jax.resolve import describe_scale, resolve
from looped_jax.runtime import agreement, distributed, hardware, sharding
from looped_jax.runtime.compilation_cache import keep_compiled
from looped_jax.runtime.profiler import Profile
from looped_jax.tasks.task import Task
from looped_jax.training import (
    fingerprint,
    optimizers,
    recomputation,
    resumption,
    stall_alarm,
    summary,
    train_step,
    validation_curve,
)
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.metric_log import EMA
from looped_jax.training.process_stats import ProcessStats
from looped_jax.training.progress import Console, memory_of
from looped_jax.training.row_draws import RowDraws
from looped_jax.training.run_folder import write_config
from looped_jax.training.run_lock import RunLock
from looped_jax.training.run_meta import RunMeta
from looped_jax.training.save_schedule import SaveSchedule
from looped_jax.training.stall_alarm import StallAlarm
from looped_jax.training.step_logger import NonFiniteLossError, StepLogger
from looped_jax.training.validation_curve import ValidationCurve


def train(
    settings: Settings, *, command: str = "the same command", profile_steps: str | None = None
) -> Path:
    """Train, or continue, the run that `settings` describe; returns its folder.

    `profile_steps` "10:13" writes a trace of these steps beside the TensorBoard curves.

    Raises ConfigError, DataError, CheckpointError or TrainingError, each with a one-line message.
    """
    with contextlib.ExitStack() as opened:
        return _train(settings, command, profile_steps, opened).run_dir


class Ended(NamedTuple):
    run_dir: Path
    complete: bool  # else a signal stopped it before its last step


def _train(
    settings: Settings, command: str, profile_steps: str | None, opened: contextlib.ExitStack
) -> Ended:
    # ---- devices, rows, and everything the run is, now that the vocabulary is known -------------
    distributed.check_joined()
    with agreement.together():
        mesh = sharding.make_mesh(settings.mesh)
        shard = sharding.data_shard(mesh)  # which part of every batch this process feeds
        task: Task = TASKS[settings.data.task](settings)
        config = resolve(settings, vocab_size=task.vocab_size)
    rows_read = task.fingerprint()
    of_rows = {f"{of}.{name}": value for of in rows_read for name, value in rows_read[of].items()}
    agreement.check_alike(settings.leaves(paths=False) | of_rows | {"jax": jax.__version__})
    model, train, run_dir = config.model, config.train, Path(config.train.run_dir)
    num_micro_batches = micro_batches(config, devices=sharding.batch_devices(mesh))
    draws = RowDraws(config, shard)
    attention = attention_kernels.check(model, hardware.attention_support(mesh))
    optimizer = optimizers.make_optimizer(config, mesh)
    abstract_state = train_step.abstract(config, optimizer, mesh)
    this_run = json_round_trip(fingerprint.of(config, rows=rows_read, hosts=shard.count))
    lock = opened.enter_context(RunLock(run_dir))
    checkpoints = opened.enter_context(
        Checkpoints(
            run_dir, keep=train.keep, keep_every=train.keep_every, keep_best=train.keep_best
        )
    )
    first_process = jax.process_index() == 0
    log = Console(quiet=not first_process)
    log(config.describe())
    log(str(attention))
    if lock.warning:
        log(lock.warning)
    notes = (optimizers.unused_groups(config), draws.loops.describe())
    for line in itertools.chain(describe_scale(settings, config), *notes):
        log(line)
    if jax.process_count() > 1:
        log(
            f"{jax.process_count()} processes, {shard.count} of which read different rows; if one "
            f"dies, the others end within a minute or so, and to go on: {command}"
        )

    names = distributed.gather_json(agreement.this_process())
    alarm = StallAlarm(run_dir, train.stall_minutes, names, log)
    opened.callback(alarm.close)

    # ---- rows: [micro-batches, rows, ...] per step ----------------------------------------------
    rows_per_step = train.tokens_per_step // model.seq_len // shard.count
    rows = task.train_rows(config, batch_size=rows_per_step, shard=shard)
    opened.callback(rows.close)
    loop_counts = tuple(sorted({*train.eval_loops, model.loops}))
    judge = task.judge(config, mesh, loop_counts=loop_counts, shard=shard)
    evaluations = task.evaluations(config, mesh, loop_counts=loop_counts)

    # ---- fresh weights, or the last checkpoint --------------------------------------------------
    start, meta = checkpoints.latest() or 0, RunMeta(step=0)
    agreement.check_alike({"the last checkpoint": start})
    if start:
        meta = checkpoints.meta(start)
        if not meta.positions:
            raise CheckpointError(
                f"train.run_dir={run_dir} holds converted weights, no run to go on with; give "
                f"another folder, and --config.train.init_from={run_dir}"
            )
        hosts = len(meta.positions)
        if hosts != shard.count and config.data.allow_host_change:
            meta.fingerprint["data"]["hosts"] = shard.count
        if (before := meta.fingerprint["train"]["steps"]) != train.steps:
            resumption.check_extends(config, before, start)
            log(f"{run_dir} goes on to step {train.steps}, not {before}")
            meta.fingerprint["train"]["steps"] = train.steps
        fingerprint.check(meta.fingerprint, this_run, run_dir=train.run_dir)
        state = checkpoints.restore(start, abstract_state)
        if hosts == shard.count:
            rows.set_state(meta.positions[shard.index])
        else:
            rows.set_state(task.remap_positions(meta.positions, shard))
            log(f"rows go on where {hosts} hosts left them, now in the order of {shard.count}")
        log(f"continuing {run_dir} from step {start}")
        if start == train.steps:
            shown = list(meta.scores.items())[: summary.SHOWN]
            told = (f"{metric} {of[model.loops]:.4f}" for metric, of in shown)
            log(", ".join([f"{run_dir} is complete: {start} steps", *told]))
            tell_what_next(task, config, log)
            return Ended(run_dir, complete=True)
    else:
        state = train_step.create(config, optimizer, mesh)
        if train.init_from:
            state = resumption.initialized(train, state, abstract_state)
            log(f"starting with the weights of {train.init_from}")
        if first_process:  # so that the folder stands alone
            write_config(run_dir, config)
            task.save(run_dir)

    # ---- compile once, and say what it takes ----------------------------------------------------
    batch_sharding = sharding.batch_sharding(mesh)
    batch = jax.tree.map(
        lambda row: jax.ShapeDtypeStruct(
            (num_micro_batches, rows_per_step * shard.count // num_micro_batches, *row.shape),
            row.dtype,
            sharding=batch_sharding,
        ),
        draws.row_shapes(task.row_shapes(config)),
    )
    began = time.perf_counter()
    alarm.at(start, "compiling")

    def compiled(config: Config) -> recomputation.Programs:
        return {
            diagnostics: train_step.make_train_step(
                config, optimizer, mesh, diagnostics=diagnostics
            )
            .lower(abstract_state, batch)
            .compile()
            for diagnostics in ((False, True) if train.diagnostics_every else (False,))
        }

    chosen = recomputation.least(config, compiled)
    config, step_programs = chosen.config, chosen.programs
    if chosen.told:
        log(chosen.told)
    costs = flops.count(model)
    peak, peak_source = hardware.device_peak_flops(jax.local_devices()[0])
    log(
        f"{costs.parameters:,} parameters, {costs.looped:,} of them looped {model.loops} times; "
        f"{costs.flops / 1e6:.1f} MFLOP per token (the reference counts "
        f"{costs.reference_flops / 1e6:.1f}); {train.steps} steps of "
        f"{train.tokens_per_step:,} tokens on {mesh.size} {jax.devices()[0].device_kind} "
        f"of {peak / 1e12:.2f} TFLOP/s ({peak_source})"
    )
    log(f"step compiled in {time.perf_counter() - began:.1f} s; {memory_of(step_programs[False])}")

    # ---- the steps ------------------------------------------------------------------------------
    step_logger = StepLogger(
        config,
        run_dir,
        start=start,
        loss_ema=EMA(meta.smoothed_loss),
        seconds=meta.seconds,
        flops_spent=meta.flops,
        peak_flops=peak * mesh.size,
        processes=ProcessStats(names),
        log=log,
    )
    opened.callback(step_logger.close)
    alarm.at(start, "in validation")
    if train.eval_first and not start:
        scores = judge(optimizers.evaluation_params(config.optim, state))
        step_logger.validated(0, scores, judge.describe(scores))
    stop = distributed.StopSignal()
    opened.callback(stop.close)
    profile = Profile(profile_steps, run_dir / "tensorboard")
    opened.callback(profile.close)
    saves = SaveSchedule(train.save_every, train.save_minutes, start=start)
    scores, best, best_step = meta.scores, meta.best, meta.best_step
    if start and due(start, train.eval_every) and meta.score is None:  # a signal came before it
        scores = judge(optimizers.evaluation_params(config.optim, state))
        step_logger.validated(start, scores, judge.describe(scores))
        late = next(iter(scores.values()))[model.loops]
        if late < (math.inf if best is None else best):
            best, best_step = late, start
    try:
        for step in range(start + 1, train.steps + 1):
            alarm.at(step, "waiting for rows")
            began = time.perf_counter()
            batch = jax.tree.map(
                lambda rows: rows.reshape(num_micro_batches, -1, *rows.shape[1:]),
                draws.join(next(rows), step),
            )
            waited = time.perf_counter() - began
            batch = jax.tree.map(
                lambda rows: jax.make_array_from_process_local_data(batch_sharding, rows), batch
            )
            alarm.at(step, stall_alarm.FOR_DEVICES)
            profile.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                step_program = step_programs[due(step, train.diagnostics_every)]
                state, metrics = step_program(state, batch)
            position, expected = rows.get_state(), draws.loops.expected(step)
            step_logger.submit(
                step,
                metrics,
                waited,
                task.epochs(position, shard),
                expected_loops=expected,
                of_rows=task.metrics(position),
            )
            if trace := profile.after(step, metrics):
                log(f"profile: {trace}")

            last, stopping = step == train.steps, stop.requested(step)
            score = None
            if last or (due(step, train.eval_every) and not stopping):  # soon it may be killed
                step_logger.flush()
                alarm.at(step, "in validation")
                scores = judge(optimizers.evaluation_params(config.optim, state))
                score = next(iter(scores.values()))[model.loops]
                if score < (math.inf if best is None else best):
                    best, best_step = score, step
                step_logger.validated(step, scores, judge.describe(scores))
            if saves.due(step) or last or stopping:
                step_logger.flush()
                alarm.at(step, "saving")
                meta = RunMeta(
                    step=step,
                    positions=positions_of_all(shard.index, rows.get_state()),
                    smoothed_loss=step_logger.loss_ema.state(),
                    scores=scores,
                    score=score,
                    best=best,
                    best_step=best_step,
                    seconds=step_logger.seconds,
                    flops=step_logger.flops,
                    config=config.to_dict(),
                    fingerprint=this_run,
                    parameters={
                        how: parameter_counts.count(model, how) for how in PARAMETER_COUNTS
                    },
                )
                checkpoints.save(step, state, meta)
                step_logger.throughput.skip()
            if stopping and not last:
                log(f"stopped by a signal after step {step}, saved in {run_dir}; go on: {command}")
                break
            for evaluation in evaluations:  # saved before: they may take a while
                if last or due(step, evaluation.every):
                    step_logger.flush()
                    alarm.at(step, "in an evaluation beside validation")
                    params = optimizers.evaluation_params(config.optim, state)
                    step_logger.evaluated(step, evaluation(params, step))
    except NonFiniteLossError as error:
        checkpoints.wait()
        raise TrainingError(
            f"stopped at step {error.step}: {error}. The last good checkpoint is step "
            f"{checkpoints.latest() or 'none'} in {run_dir}; to go on from it: {command}. If it "
            "happens again, lower the learning rates or optim.grad_clip_norm in a new train.run_dir"
        ) from None
    alarm.at(step, "saving")
    checkpoints.wait()
    alarm.at(step, "at the summary")
    if step == train.steps:
        found = summary.of(config, meta, step_logger, mesh, attention)
        if first_process:
            found.write(run_dir)
            log(validation_of(run_dir, metric=found.metric, trained=model.loops))
        log(f"{found}\n  curves: tensorboard --logdir {run_dir}")
        tell_what_next(task, config, log)
    return Ended(run_dir, complete=step == train.steps)


# ---- what the run above uses ---------------------------------------------------------------------


def positions_of_all(shard: int, position: dict[str, Any]) -> list[dict[str, Any]]:
    """Positions by shard; processes that feed the same shard stand at the same place."""
    return [where for _, where in sorted(dict(distributed.gather_json([shard, position])).items())]


def validation_of(run_dir: Path, *, metric: str, trained: int) -> str:
    """The validations of a run in words; they are drawn, too, where matplotlib is installed."""
    curve = ValidationCurve.read(run_dir, metric=metric, trained=trained)
    try:
        curve.draw(run_dir)
    except ImportError as error:
        return f"{curve}\n  not drawn: {error}"
    return f"{curve}\n  drawn: {run_dir / validation_curve.NAME}.png"


def tell_what_next(task: Task, config: Config, log: Console) -> None:
    """Commands for the complete run of `config` that can be copied, each below what it is for."""
    if commands := task.what_next(config):
        lines = (
            f"  {what}:\n    {shlex.join(cli.command_of(*of))}" for what, of in commands.items()
        )
        log("\n".join(["next", *lines]))


def json_round_trip(value: Any) -> Any:
    """As it will come back from disk, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value))


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("train", argv))


def run(args: argparse.Namespace) -> None:
    logging.set_verbosity(logging.ERROR)
    with errors.printed():
        keep_compiled()
        with distributed.joined(), contextlib.ExitStack() as opened:
            command = shlex.join(cli.command())
            ended = _train(args.settings, command, args.profile_steps, opened)
    if not ended.complete:
        raise SystemExit(errors.STOPPED_EARLY)


if __name__ == "__main__":
    main()
