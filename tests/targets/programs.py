"""Every kind of program that this package compiles, lowered for devices that are not here."""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config.settings import (
    LoopSamplingConfig,
    MeshConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
)
from looped_jax.diagnostics.measure import make_measure_step
from looped_jax.evaluation import scoring
from looped_jax.inference import decoding
from looped_jax.model import transformer
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import lr_range_test, optimizers, train_step
from looped_jax.training.row_draws import RowDraws

ROWS = 2  # of each device and micro-batch
PROGRAMS = ("train", "diagnostics", "lr_find", "score", "span", "measure", "prefill", "decode")


def make_mesh(sizes, devices):
    return sharding.make_mesh(MeshConfig(*sizes), devices[: int(np.prod(sizes))])


def make_config(*, vocab_size=4096, sampling=LoopSamplingConfig(), **model):  # noqa: B008
    settings = {"layers": 1, "loops": 3, "width": 256, "heads": 2, "seq_len": 256} | model
    config = Settings(
        model=ModelSettings(**settings),
        optim=OptimConfig(newton_schulz_steps=1),  # five are half of what a compiler works on here
        train=TrainSettings(steps=10, loop_sampling=sampling),
    )
    return resolve(config, vocab_size=vocab_size)


def compiled(program, config, mesh, *, time=None, rows=ROWS, micro_batches=2):
    """One of PROGRAMS for rows of `time` tokens, by default those of training."""
    time, rows = time or config.model.seq_len, rows * sharding.batch_devices(mesh)
    return lowered(program, config, mesh, time, rows, micro_batches).compile()


def lowered(program, config, mesh, time, rows, micro_batches):
    model = config.model
    if program in ("train", "diagnostics", "lr_find"):
        ramp = lr_range_test.ramp(0.1, 10, 10) if program == "lr_find" else None
        optimizer = optimizers.make_optimizer(config, mesh, multiplier=ramp)
        place = sharding.batch_sharding(mesh)
        batch = jax.tree.map(
            lambda row: jax.ShapeDtypeStruct(
                (micro_batches, rows, *row.shape), row.dtype, sharding=place
            ),
            RowDraws(config).row_shapes(jax.ShapeDtypeStruct((time + 1,), np.int32)),
        )
        step = train_step.make_train_step(
            config, optimizer, mesh, diagnostics=program == "diagnostics"
        )
        return step.lower(train_step.abstract(config, optimizer, mesh), batch)

    params = weights(config, mesh, "float32")
    if program == "score":
        step = scoring.make_score_step(model, mesh, (1, model.loops))
        sizes = jax.ShapeDtypeStruct(
            (model.vocab_size,), np.int32, sharding=NamedSharding(mesh, P())
        )
        return step.lower(params, ints(mesh, rows, time), ints(mesh, rows, time), sizes)
    if program == "span":
        step = scoring.make_span_step(model, mesh, (1, model.loops), 16)
        ends = ints(mesh, rows)
        return step.lower(params, ints(mesh, rows, time + 1), ends, ends)
    if program == "measure":
        step = make_measure_step(model, mesh, model.loops)
        return step.lower(params, ints(mesh, rows, time), ints(mesh, rows, time))

    steps = decoding.Steps.of(model, mesh, model.loops, "exact")
    where = steps.empty.lower(rows, 2 * time).out_info
    kept = NamedSharding(mesh, P(None, sharding.BATCH_AXES, None, "tensor"))
    memory = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kept), where)
    of_row, sampling = ints(mesh, rows), (0, 1.0, 10, 0.9)
    draws = jax.ShapeDtypeStruct((rows,), np.uint32, sharding=of_row.sharding)
    params = weights(config, mesh, model.dtype)
    if program == "prefill":
        tokens = ints(mesh, rows, time)
        return steps.prefill.lower(params, memory, tokens, of_row, draws, *sampling)
    return steps.decode.lower(params, memory, of_row, of_row, draws, *sampling)


def weights(config, mesh, dtype):
    described, where = transformer.weights(config.model), transformer.shardings(config.model, mesh)
    sharding.check_divisible(config, mesh, described)
    return {
        n: jax.ShapeDtypeStruct(w.shape, dtype, sharding=where[n]) for n, w in described.items()
    }


def ints(mesh, *shape):
    where = NamedSharding(mesh, P(sharding.BATCH_AXES))
    return jax.ShapeDtypeStruct(shape, np.int32, sharding=where)
