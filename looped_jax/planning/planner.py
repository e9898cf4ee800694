"""What a run would take on hardware that is not here: memory, work, messages, time, and a way out.

Compiles the real train step for fake CPU devices, one for every device of the mesh, without any
array. plan.py is the program around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from looped_jax.config import Config, micro_batches
from looped_jax.errors import ConfigError
from looped_jax.model import attention_kernels, flops
from looped_jax.planning import collectives, memory, step_time
from looped_jax.planning.collectives import Collective
from looped_jax.planning.memory import Memory
from looped_jax.planning.step_time import StepTime, Work
from looped_jax.runtime import sharding
from looped_jax.runtime.hardware import Hardware
from looped_jax.training import optim, train_step

REMATS = ("loop", "dots", "none")  # what is planned, from least to most memory
USABLE = 0.9  # share of device memory to plan with; the rest is for the runtime and the uncounted
WORTHWHILE = 0.05  # share of the step time that a proposed change must save


@dataclass(frozen=True)
class Choice:
    """What one configuration takes of every device, per step. Bytes, FLOPs and seconds.

    memory: counted, with the attention kernel of the hardware; memory_xla: with XLA's attention
    arguments, temporaries: as the CPU compiler reports them
    """

    config: Config
    kernel: str
    micro_batches: int
    memory: Memory
    memory_xla: Memory
    arguments: int
    temporaries: int
    collectives: list[Collective]
    work: Work
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """One Choice for every value of model.remat, and settings that are better than the configured.

    warnings: what had to be changed for a plan to be possible at all; changes: settings that make
    it fit or, where it fits already, clearly faster; better: what it takes then. Nothing and None
    where there are no such settings.
    """

    config: Config
    hardware: Hardware
    efficiency: float
    choices: dict[str, Choice]
    warnings: tuple[str, ...] = ()
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    better: Choice | None = None

    @property
    def asked(self) -> Choice:
        """What the configuration asks for."""
        return self.choices[self.config.model.remat]

    def fits(self, choice: Choice) -> bool:
        return choice.memory.total <= USABLE * self.hardware.memory


def make(
    config: Config,
    hardware: Hardware,
    *,
    efficiency: float = 0.45,
    remats: tuple[str, ...] = REMATS,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plan a resolved config with a given number of steps, on the first of jax.devices().

    `efficiency` is the share of the peak that matrix products are assumed to reach. Raises
    ConfigError for a mesh, batch or kernel that cannot work.
    """
    if config.model.remat not in REMATS:
        raise ConfigError(
            f"model.remat={config.model.remat} depends on the way to the host's memory, of which "
            f"nothing is known here; plan with one of {', '.join(REMATS)}"
        )
    say(str(attention_kernels.check(config.model, hardware.attention)))
    config, warnings = with_possible_batch(config)
    choices = {
        remat: weigh(changed(config, {"model.remat": remat}), hardware, efficiency, say)
        for remat in REMATS
        if remat in (*remats, config.model.remat)
    }
    plan = Plan(config, hardware, efficiency, choices, warnings)
    changes = faster(plan) if plan.fits(plan.asked) else smaller(plan, say)
    if not changes:
        return plan
    if changes.keys() == {"model.remat"}:  # compiled already
        better = choices[changes["model.remat"]]
    else:
        say(f"trying {', '.join(f'{key}={value}' for key, value in changes.items())}")
        better = weigh(changed(config, changes), hardware, efficiency, say)
    return dataclasses.replace(plan, changes=changes, better=better)


def smaller(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """The changes that cost least among those that make the configured run fit; {} if none does."""
    say("too big; looking for settings that fit ...")
    for changes in cheaper(plan.config):
        with contextlib.suppress(ConfigError):  # sizes that do not divide
            counted = count_memory(changed(plan.config, changes), plan.hardware)
            if counted.total <= USABLE * plan.hardware.memory:
                return changes
    return {}


def faster(plan: Plan) -> dict[str, Any]:
    """Changes that keep more instead of recomputing it, with smaller micro-batches where needed.

    They have to save WORTHWHILE of the time, since small matrices may cost some of it again.
    """
    best, best_time, mesh = {}, plan.asked.time.total, mesh_of(plan.config)
    devices = sharding.batch_devices(mesh)
    for remat, choice in plan.choices.items():
        for rows in divisors(plan.config.train.batch_size):
            changes = {"model.remat": remat, "train.batch_size": rows}
            other = changed(plan.config, changes)
            counted = count_memory(other, plan.hardware)
            if counted.total > USABLE * plan.hardware.memory:
                continue
            work = step_time.work(
                other,
                mesh.shape,
                micro_batches=micro_batches(other, devices=devices),
                kernel=choice.kernel,
            )
            sent = choice.collectives  # as much for any number of micro-batches
            time = step_time.estimate(
                work, sent, mesh.shape, plan.hardware, efficiency=plan.efficiency
            )
            if time.total < (1 - WORTHWHILE) * best_time:
                best, best_time = changes, time.total
            break
    asked = {
        "model.remat": plan.config.model.remat,
        "train.batch_size": plan.config.train.batch_size,
    }
    return {key: value for key, value in best.items() if value != asked[key]}


def weigh(
    config: Config, hardware: Hardware, efficiency: float, say: Callable[[str], None]
) -> Choice:
    """Compile the train step of one config and count what it takes."""
    mesh, began = mesh_of(config), time.perf_counter()
    say(f"compiling remat={config.model.remat} for {mesh.size} fake devices ...")
    program = compile_step(config)
    say(f"compiled in {time.perf_counter() - began:.0f} s")
    sent = collectives.read(
        program,
        mesh,
        widths={
            "optimizer": jnp.dtype(config.optim.newton_schulz_dtype).itemsize,
            "activations": jnp.dtype(config.model.dtype).itemsize,
        },
    )
    accumulated = micro_batches(config, devices=sharding.batch_devices(mesh))
    kernel = kernel_on(config, hardware)
    work = step_time.work(config, mesh.shape, micro_batches=accumulated, kernel=kernel)
    analysis = program.memory_analysis()
    assert analysis is not None  # the CPU compiler tells
    return Choice(
        config=config,
        kernel=kernel,
        micro_batches=accumulated,
        memory=count_memory(config, hardware),
        memory_xla=count_memory(config, hardware, kernel="xla"),
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        collectives=sent,
        work=work,
        time=step_time.estimate(work, sent, mesh.shape, hardware, efficiency=efficiency),
    )


def compile_step(config: Config) -> jax.stages.Compiled:
    """The train step for the mesh of `config`, with XLA's attention: others need their hardware."""
    config = changed(config, {"model.kernel": "xla"})
    mesh = mesh_of(config)
    rows = config.train.batch_size * sharding.batch_devices(mesh)
    accumulated = micro_batches(config, devices=sharding.batch_devices(mesh))
    tokens = jax.ShapeDtypeStruct(
        (accumulated, rows, config.model.seq_len + 1),
        np.int32,
        sharding=sharding.batch_sharding(mesh),
    )
    optimizer, shapes = abstract_state(config, mesh)
    step = train_step.make_train_step(config, optimizer, mesh).lower(shapes, tokens)
    # Nobody will run it: quick machine code halves the time, and memory and messages are the same.
    return step.compile(compiler_options={"xla_backend_optimization_level": "0"})


def count_memory(config: Config, hardware: Hardware, *, kernel: str | None = None) -> Memory:
    """Memory of the train step, counted without compiling. Raises ConfigError."""
    mesh = mesh_of(config)
    accumulated = micro_batches(config, devices=sharding.batch_devices(mesh))
    return memory.count(
        config,
        mesh,
        abstract_state(config, mesh)[1],
        kernel=kernel or kernel_on(config, hardware),
        micro_batches=accumulated,
    )


def abstract_state(config: Config, mesh: Mesh) -> tuple[Any, train_step.State]:
    """The optimizer of `config`, and shapes and shardings of its train state."""
    optimizer = optim.make_optimizer(config, mesh)
    return optimizer, train_step.abstract(config, optimizer, mesh)


def mesh_of(config: Config) -> Mesh:
    """The mesh of `config` over the first devices there are; all of its sizes must be given."""
    size = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    return sharding.make_mesh(config.mesh, jax.devices()[:size])


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


def with_horizon(config: Config) -> Config:
    """train.steps as training would set it: 20 tokens per parameter unless it is given."""
    if config.train.steps is not None:
        return config
    tokens = 20 * flops.count(config.model).parameters
    return changed(config, {"train.steps": max(1, tokens // config.train.tokens_per_step)})


def cheaper(config: Config) -> Iterator[dict[str, Any]]:
    """Changes that need less memory, those that cost least first.

    A smaller micro-batch with the same tokens per step changes no result; smaller chunks of logits
    change none either; recomputing costs up to a third more FLOPs; more `fsdp` in place of `data`
    costs messages.
    """
    model, mesh, batch = config.model, config.mesh, config.train.batch_size
    chunk = memory.logit_chunk(model, batch)
    for times in reversed(divisors(mesh.data)):
        for remat in reversed(REMATS[: REMATS.index(model.remat) + 1]):
            for tokens in (chunk, max(1, chunk // 4)):
                for rows in divisors(batch):
                    wanted = {
                        "train.batch_size": (batch, rows),
                        "model.loss_chunk": (chunk, tokens),
                        "model.remat": (model.remat, remat),
                        "mesh.data": (mesh.data, mesh.data // times),
                        "mesh.fsdp": (mesh.fsdp, mesh.fsdp * times),
                    }
                    if changes := {key: new for key, (old, new) in wanted.items() if new != old}:
                        yield changes


def divisors(number: int) -> list[int]:
    """From the number itself down to 1."""
    return [n for n in range(number, 0, -1) if number % n == 0]
