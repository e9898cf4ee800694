"""The train step: gradients of the objective over all micro-batches, then one optimizer step.

One optimizer step gathers the sharded weights once, lets every micro-batch and every loop
accumulate gradients locally, and reduces them once: communication does not grow with K. Where no
device can hold them whole, model.gather="layer" does so in every product: model/cut_weight.py.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config.registry import WEIGHT_GROUPS
from looped_jax.config.resolved import Config
from looped_jax.model import (
    attention_kernels,
    objectives,
    random_numbers,
    sampled_loops,
    transformer,
)
from looped_jax.model.cut_weight import CutWeight
from looped_jax.model.objectives import Batch
from looped_jax.model.probe import BLIND, TAPS, Probe, Taps, closed_taps
from looped_jax.model.transformer import LoopStates, Params
from looped_jax.runtime import sharding
from looped_jax.training import optimizers
from looped_jax.training.train_state import TrainState

Array = jax.Array
Metrics = dict[str, Any]


def create(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh train state, each leaf born on its devices; the numbers do not depend on the mesh."""
    shardings = sharding.state_shardings(
        mesh, abstract(config, optimizer, mesh), transformer.weights(config.model)
    )
    fresh = jax.jit(lambda: _fresh(config, optimizer), out_shardings=shardings)
    return fresh()


def abstract(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the train state, without any array. Raises ConfigError."""
    shapes = jax.eval_shape(lambda: _fresh(config, optimizer))
    weights = transformer.weights(config.model)
    sharding.check_divisible(config, mesh, weights)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.state_shardings(mesh, shapes, weights),
    )


def _fresh(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    params = transformer.init_params(config.model, jax.random.key(config.train.seed))
    return TrainState(params, optimizer.init(params), jnp.zeros([], jnp.int32))


def make_train_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    diagnostics: bool = False,
) -> jax.stages.Wrapped:
    """Jitted (state, tokens [M, rows, T + 1]) -> (state, metrics); the state is donated.

    Other batches: see `gradients`.

    The M micro-batches are averaged token by token, so the result does not depend on how rows are
    spread over micro-batches and devices. Metrics: `loss` of the last loop, `objective`,
    `loop_losses` [scored], `norms` [K], `grad_norm` before clipping, `learning_rate_multiplier`;
    `scalars` by name after the step, of the groups of weights that are logged; with
    train.loop_sampling `loops` as sampled_loops.run_in gives it, and for K its loops with
    gradients, a norm that no micro-batch had being NaN.

    With `diagnostics` also a dict `diagnostics` of what happens inside: `gradient_attention`,
    `gradient_mlp`, `gradient_block` [K, L] norm over all tokens of the objective's gradient where
    it arrives at that output; `residual_norm` [K, L] mean over tokens, of the stream after each
    layer; `weight_gradient` (before clipping), `weight_norm` (before the update), `weight_update`
    by name.
    """
    multiplier = optimizers.learning_rate_multiplier(config.optim, config.train.steps)
    weights = transformer.weights(config.model)
    scalars = [name for name, weight in weights.items() if WEIGHT_GROUPS[weight.group].logged]

    def step(state: TrainState, tokens: Array) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients(config, mesh, state.params, tokens, diagnostics=diagnostics)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["learning_rate_multiplier"] = multiplier(state.step)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics["scalars"] = {name: params[name] for name in scalars}
        if diagnostics:
            by_weight = {"gradient": grads, "norm": state.params, "update": updates}
            for kind, found in by_weight.items():
                norms = {name: jnp.linalg.norm(weight) for name, weight in found.items()}
                metrics["diagnostics"][f"weight_{kind}"] = norms
        return TrainState(params, optimizer_state, state.step + 1), metrics

    shardings = sharding.state_shardings(mesh, abstract(config, optimizer, mesh), weights)
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def gradients(
    config: Config,
    mesh: Mesh,
    params: Params,
    tokens: Array | Batch,
    *,
    diagnostics: bool = False,
) -> tuple[Params, Metrics]:
    """Gradient of the objective, sharded like params, and metrics.

    `tokens` [M, rows, T + 1] are M micro-batches of text, each token the target of the one before;
    or a batch of any other task, see model/objectives/base.py, each of its arrays [M, rows, …],
    targets of each loop [M, rows, N, T]. It also holds what RowDraws.join adds. With
    train.loop_sampling metrics are of the loops with gradients.
    """
    model, axes = config.model, sharding.batch_axes(mesh)
    specs = sharding.manual_specs(mesh, transformer.weights(model))
    attend = attention_kernels.for_mesh(model, mesh, training=True)
    sampling = config.train.loop_sampling
    longest = sampling.longest(model.loops)
    taps = closed_taps(model, longest if sampling.on else None) if diagnostics else None
    scored = objectives.of(model)
    drawn = random_numbers.in_training(model)

    def states_of(params: Params, batch: Batch, probe: Probe) -> LoopStates:
        seeds = batch["seeds"] if drawn else None
        if not sampling.on:
            return transformer.forward(
                model,
                params,
                batch["inputs"],
                return_loops=scored.loops(model),
                probe=probe,
                attend=attend,
                seeds=seeds,
            )
        counts = sampled_loops.Counts(
            batch["loops"] if sampling.per == "sequence" else None,
            batch["total"],
            batch["backward"],
        )
        return sampled_loops.forward(
            model,
            params,
            batch["inputs"],
            counts,
            longest=longest,
            probe=probe,
            attend=attend,
            seeds=seeds,
        )

    def objective(params: Params, taps: Array | None, rows: Array | Batch) -> tuple[Array, Metrics]:
        batch = objectives.batch_of(rows)
        params = transformer.whole_outside_of_layers(model, params)
        states = states_of(params, batch, BLIND if taps is None else Taps(taps))
        total, nats = scored.loss(model, params, states.hidden, batch)
        tokens = objectives.count(batch)
        return total, {
            "objective": total,
            "loop_losses": nats,
            "tokens": tokens.astype(jnp.float32),
            "norms": states.norms,
            "layer_norms": states.seen,
        }

    differentiate = jax.grad(objective, argnums=(0, 1), has_aux=True)

    def local(shards: Params, tokens: Array | Batch) -> tuple[Params, Metrics]:
        gathered = transformer.prepare(model, shards, specs, gradients=True)
        if sampling.on:
            tokens = sampled_loops.in_step(cast(Batch, tokens), axes)

        @jax.named_scope("micro_batch")
        def micro_batch(rows: Any) -> tuple[Params, Metrics]:
            (grads, squares), sums = differentiate(gathered, taps, rows)
            return grads, {"squares": squares, **sums}

        def add(total: Any, rows: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, micro_batch(rows)), None

        first = jax.tree.map(lambda rows: rows[0], tokens)
        num_micro_batches = len(jax.tree.leaves(tokens)[0])
        if num_micro_batches == 1:
            # In a scan of one the TPU's compiler would compute all of it twice.
            grads, sums = micro_batch(first)
        else:
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(micro_batch, first)
            )
            (grads, sums), _ = jax.lax.scan(add, zeros, tokens)
        sums = jax.lax.psum(sums, axes)
        devices = sharding.batch_devices(mesh)

        def by_pass(norms: Array) -> Array:
            if sampling.on:  # not every micro-batch runs every loop
                passes = sampled_loops.passes(cast(Batch, tokens), longest)
                return (norms.T / (passes * devices)).T
            return norms / (num_micro_batches * devices)

        grads = {name: _reduce(g, specs[name], axes) / sums["tokens"] for name, g in grads.items()}
        losses = sums["loop_losses"] / sums["tokens"]
        metrics = {
            "loss": losses[-1],
            "objective": sums["objective"] / sums["tokens"],
            "loop_losses": losses,
            "norms": by_pass(sums["norms"]),
        }
        if sampling.on:
            metrics["loops"] = sampled_loops.run_in(cast(Batch, tokens), axes)
        if diagnostics:
            arriving = jnp.sqrt(sums["squares"]) / sums["tokens"]
            metrics["diagnostics"] = {
                **{f"gradient_{name}": arriving[..., i] for i, name in enumerate(TAPS)},
                "residual_norm": by_pass(sums["layer_norms"]),
            }
        return grads, metrics

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, P(None, sharding.BATCH_AXES)),
        out_specs=(specs, P()),
        axis_names=set(sharding.BATCH_AXES),
        check_vma=False,
    )(params, tokens)


def _reduce(grad: Array | CutWeight, spec: P, axes: tuple[str, ...]) -> Array:
    if isinstance(grad, CutWeight):  # summed over the devices that cut it wherever it was used
        grad = grad.piece
    else:
        for axis, name in enumerate(spec):
            if name is not None:
                grad = sharding.scatter(grad, name, axis)
    rest = tuple(axis for axis in axes if axis not in spec)
    return jax.lax.psum(grad, rest)
