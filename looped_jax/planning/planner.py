"""Estimated costs of a run on any hardware, and recommended settings.

Counts memory, work and communication of a step and estimates its time, from the real train step as
it is traced, without allocating an array; for a target that step is compiled, too. The program is
looped_jax/plan.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from looped_jax.config.resolved import Config, micro_batches
from looped_jax.config.setting_tree import plain
from looped_jax.errors import ArgumentError, ConfigError
from looped_jax.model import attention_kernels, transformer
from looped_jax.planning import communication, compiled_cost, memory, step_time
from looped_jax.planning.collectives import Collective
from looped_jax.planning.compiled_cost import CompiledCost
from looped_jax.planning.memory import Memory
from looped_jax.planning.step_time import StepTime, Work
from looped_jax.planning.targets import Target
from looped_jax.runtime import sharding
from looped_jax.runtime.hardware import Hardware
from looped_jax.training import optimizers, recomputation, train_step
from looped_jax.training.recomputation import AUTO
from looped_jax.training.row_draws import RowDraws
from looped_jax.training.train_state import TrainState

PLANNED_REMATS = ("loop", "dots", "none")  # from least to most memory
USABLE_MEMORY = 0.9  # share of device memory to plan with; the rest: runtime, temporaries
# Share of a GPU's memory that JAX allocates by default: docs.jax.dev, "GPU memory allocation".
JAX_FRACTION = 0.75
ASSUMED = 0.45  # share of the peak that matrix products reach, where nobody says better
MIN_SAVING = 0.05  # share of the step time that a recommended change must save
FILE_KEYS = {  # field -> its key in the JSON of a plan
    "recommended": "better", "saved_activations": "kept", "bytes_sent": "sent",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Estimated costs of one configuration, per device and step. Bytes, FLOPs and seconds.

    memory: counted, with the attention kernel of the hardware; memory_xla: with XLA's attention
    """

    config: Config
    kernel: str
    micro_batches: int
    memory: Memory
    memory_xla: Memory
    collectives: list[Collective]
    work: Work
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """A Choice for every value of model.remat, and recommended changes of the configuration.

    warnings: what had to be changed for a plan to be possible at all
    source: of the efficiency, "given", "assumed" or "compiled"
    target, compiled: what that target's own compiler makes of the configuration as it is
    changes: settings that make
    it fit or, where it fits already, faster; recommended: the costs with them. Empty and None
    where no such settings were found.
    """

    config: Config
    hardware: Hardware
    efficiency: float
    choices: dict[str, Choice]
    warnings: tuple[str, ...] = ()
    source: str = "given"
    target: str | None = None
    compiled: CompiledCost | None = None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    recommended: Choice | None = None

    @property
    def requested(self) -> Choice:
        """The configuration as it is."""
        return self.choices[self.config.model.remat]

    def fits(self, choice: Choice) -> bool:
        return choice.memory.total <= USABLE_MEMORY * self.hardware.memory

    def as_json(self) -> dict[str, Any]:
        """Plain values by their names in files, which are older than some of these fields."""
        return _file_keys(plain(self))


def _file_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {FILE_KEYS.get(key, key): _file_keys(one) for key, one in value.items()}
    return [_file_keys(one) for one in value] if isinstance(value, list) else value


def make(
    config: Config,
    hardware: Hardware,
    *,
    efficiency: float | None = None,
    remats: tuple[str, ...] = PLANNED_REMATS,
    target: Target | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plan a resolved config with a given number of steps, on the first of jax.devices().

    `target`, if given, compiles the configuration too, as it is; `log` is told of what takes long.
    `efficiency` is the share of the peak that matrix products reach: by default as compiled, and
    without a target ASSUMED. Raises ConfigError for a mesh, batch or kernel that cannot work.
    """
    if config.model.remat not in (*PLANNED_REMATS, AUTO):
        raise ConfigError(
            f"model.remat={config.model.remat} depends on the bandwidth to the host's memory, "
            f"which is not known here; plan with one of {', '.join(PLANNED_REMATS)}"
        )
    if config.train.loop_sampling.on:
        raise ConfigError(
            "train.loop_sampling: the loops of a step are not known before it; plan a fixed number "
            "that costs as much, with train.loop_sampling.distribution=fixed, backward_loops=None "
            "and curriculum=none"
        )
    log(str(attention_kernels.check(config.model, hardware.attention)))
    config, warnings = with_possible_batch(config)
    if config.model.remat == AUTO:
        config = chosen(config, hardware)
        log(f"model.remat=auto: {config.model.remat}, as counted")
    compiled, source = None, "given" if efficiency else "assumed"
    if target:
        began = time.perf_counter()
        log(f"compiling remat={config.model.remat} for {target.name} by its own compiler ...")
        compiled = compile_for(config, target)
        log(f"compiled in {time.perf_counter() - began:.0f} s")
    if compiled and not efficiency:
        efficiency, source = reached(config, hardware, compiled), "compiled"
    efficiency = efficiency or ASSUMED
    choices = {
        remat: estimate_cost(changed(config, {"model.remat": remat}), hardware, efficiency)
        for remat in PLANNED_REMATS
        if remat in (*remats, config.model.remat)
    }
    plan = Plan(
        config, hardware, efficiency, choices, warnings,
        source=source, target=target.name if target else None, compiled=compiled,
    )  # fmt: skip
    changes = (
        changes_that_speed_up(plan) if plan.fits(plan.requested) else changes_that_fit(plan, log)
    )
    if not changes:
        return plan
    recommended = estimate_cost(changed(config, changes), hardware, efficiency)
    return dataclasses.replace(plan, changes=changes, recommended=recommended)


def chosen(config: Config, hardware: Hardware) -> Config:
    """What remat "auto" will be, by counted memory: the least recomputation that fits.

    Of a GPU's memory JAX takes JAX_FRACTION, unless told otherwise, and the run asks for that.
    """
    fraction = JAX_FRACTION if hardware.platform == "gpu" else 1.0
    for remat in recomputation.ORDER:
        config = changed(config, {"model.remat": remat})
        need = count_memory(config, hardware).total
        if need <= recomputation.USABLE * fraction * hardware.memory:
            break
    return config


def changes_that_fit(plan: Plan, log: Callable[[str], None]) -> dict[str, Any]:
    """The changes that cost least among those that make the configured run fit; {} if none does."""
    log("too big; looking for settings that fit ...")
    for changes in fit_candidates(plan.config):
        # Sizes that do not divide, or a part of one's own that needs whole weights.
        with contextlib.suppress(ConfigError, ArgumentError):
            other = changed(plan.config, changes)
            if count_memory(other, plan.hardware).total <= USABLE_MEMORY * plan.hardware.memory:
                communicated(other)
                return changes
    return {}


def changes_that_speed_up(plan: Plan) -> dict[str, Any]:
    """Changes that recompute less, with smaller micro-batches where memory requires them.

    Only if they save MIN_SAVING of the step time: products of smaller matrices may be slower.
    """
    best, best_time, mesh = {}, plan.requested.time.total, mesh_of(plan.config)
    devices = sharding.batch_devices(mesh)
    for remat, choice in plan.choices.items():
        for rows in divisors(plan.config.train.batch_size):
            changes = {"model.remat": remat, "train.batch_size": rows}
            other = changed(plan.config, changes)
            counted = count_memory(other, plan.hardware)
            if counted.total > USABLE_MEMORY * plan.hardware.memory:
                continue
            work = step_time.work(
                other,
                mesh.shape,
                micro_batches=micro_batches(other, devices=devices),
                kernel=choice.kernel,
            )
            time = step_time.estimate(
                work, communicated(other), mesh.shape, plan.hardware, efficiency=plan.efficiency
            )
            if time.total < (1 - MIN_SAVING) * best_time:
                best, best_time = changes, time.total
            break
    current = {
        "model.remat": plan.config.model.remat,
        "train.batch_size": plan.config.train.batch_size,
    }
    return {key: value for key, value in best.items() if value != current[key]}


def estimate_cost(config: Config, hardware: Hardware, efficiency: float) -> Choice:
    """Estimate the costs of one config."""
    mesh, kernel = mesh_of(config), kernel_on(config, hardware)
    num_micro_batches = micro_batches(config, devices=sharding.batch_devices(mesh))
    work = step_time.work(config, mesh.shape, micro_batches=num_micro_batches, kernel=kernel)
    sent = communicated(config)
    return Choice(
        config=config,
        kernel=kernel,
        micro_batches=num_micro_batches,
        memory=count_memory(config, hardware),
        memory_xla=count_memory(config, hardware, kernel="xla"),
        collectives=sent,
        work=work,
        time=step_time.estimate(work, sent, mesh.shape, hardware, efficiency=efficiency),
    )


def communicated(config: Config) -> list[Collective]:
    """What one device sends in a step, the largest first."""
    mesh = mesh_of(config)
    added = communication.of_tensor(
        config, mesh, micro_batches=micro_batches(config, devices=sharding.batch_devices(mesh))
    )
    return sorted([*_stated(_sending_alike(config)), *added], key=lambda c: -c.bytes_sent)


def _sending_alike(config: Config) -> Config:
    """One of all configs whose programs state the same collectives.

    Weights travel once a step; where layers gather them, in every micro-batch, and for what is
    recomputed too.
    """
    rows = sharding.batch_devices(mesh_of(config))
    layer = config.model.gather == "layer"
    passes = micro_batches(config, devices=rows) if layer else 1
    return changed(config, {
        "model.remat": config.model.remat if layer else "loop", "model.loss_chunk": None,
        "model.kernel": "xla", "train.batch_size": 1,
        "train.tokens_per_step": passes * rows * config.model.seq_len,
    })  # fmt: skip


@functools.lru_cache(maxsize=64)
def _stated(config: Config) -> list[Collective]:
    mesh = mesh_of(config)
    weights = transformer.weights(config.model)
    return communication.stated(trace_step(config, mesh).jaxpr.jaxpr, mesh, weights)


def reached(config: Config, hardware: Hardware, compiled: CompiledCost) -> float:
    """The share of the peak that a step's FLOPs have, by the seconds of what was compiled."""
    mesh = mesh_of(config)
    work = step_time.work(
        config,
        mesh.shape,
        micro_batches=micro_batches(config, devices=sharding.batch_devices(mesh)),
        kernel=kernel_on(config, hardware),
    )
    busy = compiled.seconds - compiled.parts["collectives in the open"].seconds
    return work.flops / (busy * hardware.peak_flops)


def compile_for(config: Config, target: Target) -> CompiledCost:
    """What the target's own compiler makes of the train step of `config`, over all its devices."""
    mesh = mesh_on(config, target)
    compiled = trace_step(config, mesh).lower().compile()
    return compiled_cost.read(compiled, mesh, target.hardware, config.model)


def trace_step(config: Config, mesh: Mesh) -> jax.stages.Traced:
    """The train step of `config` for the devices of `mesh`."""
    rows = config.train.batch_size * sharding.batch_devices(mesh)
    num_micro_batches = micro_batches(config, devices=sharding.batch_devices(mesh))
    text = jax.ShapeDtypeStruct((config.model.seq_len + 1,), np.int32)
    batch = jax.tree.map(
        lambda row: jax.ShapeDtypeStruct(
            (num_micro_batches, rows, *row.shape),
            row.dtype,
            sharding=sharding.batch_sharding(mesh),
        ),
        RowDraws(config).row_shapes(text),
    )
    optimizer, shapes = abstract_state(config, mesh)
    return train_step.make_train_step(config, optimizer, mesh).trace(shapes, batch)


def count_memory(config: Config, hardware: Hardware, *, kernel: str | None = None) -> Memory:
    """Memory of the train step, counted without compiling. Raises ConfigError."""
    mesh = mesh_of(config)
    num_micro_batches = micro_batches(config, devices=sharding.batch_devices(mesh))
    return memory.count(
        config,
        mesh,
        abstract_state(config, mesh)[1],
        kernel=kernel or kernel_on(config, hardware),
        micro_batches=num_micro_batches,
    )


def abstract_state(config: Config, mesh: Mesh) -> tuple[Any, TrainState]:
    """The optimizer of `config`, and shapes and shardings of its train state."""
    optimizer = optimizers.make_optimizer(config, mesh)
    return optimizer, train_step.abstract(config, optimizer, mesh)


def mesh_of(config: Config) -> Mesh:
    """The mesh of `config` over the first devices there are; all of its sizes must be given."""
    size = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    return sharding.make_mesh(config.mesh, jax.devices()[:size])


def mesh_on(config: Config, target: Target) -> Mesh:
    """The mesh of `config` over the devices of a target."""
    return sharding.make_mesh(config.mesh, list(target.devices))


def kernel_on(config: Config, hardware: Hardware) -> str:
    """The attention kernel that the run would use on that hardware. Raises ConfigError."""
    return attention_kernels.check(config.model, hardware.attention).kernel


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with other values, as {"model.remat": "none"}."""
    for key, value in changes.items():
        group, name = key.split(".")
        values = dataclasses.replace(getattr(config, group), **{name: value})
        config = dataclasses.replace(config, **{group: values})
    return config


def with_possible_batch(config: Config) -> tuple[Config, tuple[str, ...]]:
    """`config`, with a smaller micro-batch and a warning if the given one does not divide the step.

    Raises ConfigError when not even one row per device does.
    """
    devices = sharding.batch_devices(mesh_of(config))
    try:
        micro_batches(config, devices=devices)
    except ConfigError as error:
        per_device = config.train.tokens_per_step / (config.model.seq_len * devices)
        possible = [n for n in range(config.train.batch_size, 0, -1) if per_device % n == 0]
        if not possible:
            raise
        warning = f"{error}. Planned with train.batch_size={possible[0]}"
        return changed(config, {"train.batch_size": possible[0]}), (warning,)
    return config, ()


def fit_candidates(config: Config) -> Iterator[dict[str, Any]]:
    """Changes that need less memory, those that cost least first.

    Smaller micro-batches with the same tokens per step and smaller chunks of logits change no
    result; recomputing costs up to a third more FLOPs; more `fsdp` in place of `data` costs
    communication once a step, and layers that gather their own weights in every micro-batch.
    """
    model, mesh, batch = config.model, config.mesh, config.train.batch_size
    chunk = memory.logit_chunk(model, batch)
    remats = PLANNED_REMATS[: PLANNED_REMATS.index(model.remat) + 1]
    for gather, factor, remat, tokens, rows in itertools.product(
        dict.fromkeys((model.gather, "layer")),
        reversed(divisors(mesh.data)),
        reversed(remats),
        (chunk, max(1, chunk // 4)),
        divisors(batch),
    ):
        if gather != model.gather and mesh.fsdp * factor == 1:  # nothing is gathered
            continue
        settings = {
            "train.batch_size": (batch, rows),
            "model.loss_chunk": (chunk, tokens),
            "model.remat": (model.remat, remat),
            "model.gather": (model.gather, gather),
            "mesh.data": (mesh.data, mesh.data // factor),
            "mesh.fsdp": (mesh.fsdp, mesh.fsdp * factor),
        }
        if changes := {key: new for key, (old, new) in settings.items() if new != old}:
            yield changes


def divisors(number: int) -> list[int]:
    """Divisors, from the number itself down to 1."""
    return [n for n in range(number, 0, -1) if number % n == 0]
