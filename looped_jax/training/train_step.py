"""The train state {params, optimizer, step}, and the two jitted programs that use it.

One optimizer step gathers the sharded weights once, lets every micro-batch and every loop
accumulate gradients locally, and reduces them once: communication does not grow with K.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config import Config
from looped_jax.model import attention_kernels, objectives, transformer
from looped_jax.model.objectives import Batch
from looped_jax.model.probe import BLIND, TAPS, Taps, closed_taps
from looped_jax.model.transformer import Params
from looped_jax.runtime import sharding
from looped_jax.training import optim

Array = jax.Array
State = dict[str, Any]
Metrics = dict[str, Any]


def create(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """A fresh train state, each leaf born on its devices; the numbers do not depend on the mesh."""
    shardings = sharding.state_shardings(
        mesh, abstract(config, optimizer, mesh), transformer.weights(config.model)
    )
    fresh = jax.jit(lambda: _fresh(config, optimizer), out_shardings=shardings)
    return fresh()


def abstract(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes, types and shardings of the train state, without any array. Raises ConfigError."""
    shapes = jax.eval_shape(lambda: _fresh(config, optimizer))
    weights = transformer.weights(config.model)
    sharding.check_divisible(config, mesh, weights)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.state_shardings(mesh, shapes, weights),
    )


def _fresh(config: Config, optimizer: optax.GradientTransformation) -> State:
    params = transformer.init_params(config.model, jax.random.key(config.train.seed))
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "step": jnp.zeros([], jnp.int32),
    }


def evaluation_params(state: State) -> Params:
    """The weights that are scored, sampled from and studied: what an optimizer that averages, or
    that trains other weights than it means, would give in their place."""
    return state["params"]


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, *, inside: bool = False
) -> jax.stages.Wrapped:
    """Jitted (state, tokens [M, rows, T + 1]) -> (state, metrics); the state is donated.

    The M micro-batches are averaged token by token, so the result does not depend on how rows are
    spread over micro-batches and devices. Metrics: `loss` of the last loop, `objective`,
    `loop_losses` [scored], `norms` [K], `grad_norm` before clipping,
    `learning_rate_multiplier`.

    With `inside` also a dict `inside` of what happens in there: `gradient_attention`,
    `gradient_mlp`, `gradient_block` [K, L] norm over all tokens of the objective's gradient where
    it arrives at that output; `stream_norm` [K, L] mean over tokens after each layer;
    `weight_gradient` (before clipping), `weight_norm` (before the update), `weight_update` by name.
    """
    multiplier = optim.learning_rate_multiplier(config.optim, config.train.steps or 1)

    def step(state: State, tokens: Array) -> tuple[State, Metrics]:
        grads, metrics = gradients(config, mesh, state["params"], tokens, inside=inside)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["learning_rate_multiplier"] = multiplier(state["step"])
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        if inside:
            by_weight = {"gradient": grads, "norm": state["params"], "update": updates}
            for kind, weights in by_weight.items():
                norms = {name: jnp.linalg.norm(weight) for name, weight in weights.items()}
                metrics["inside"][f"weight_{kind}"] = norms
        state = {"params": params, "optimizer": optimizer_state, "step": state["step"] + 1}
        return state, metrics

    shardings = sharding.state_shardings(
        mesh, abstract(config, optimizer, mesh), transformer.weights(config.model)
    )
    copied = NamedSharding(mesh, P())
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, copied),
        donate_argnums=0,
    )


def gradients(
    config: Config,
    mesh: Mesh,
    params: Params,
    tokens: Array | Batch,
    *,
    inside: bool = False,
) -> tuple[Params, Metrics]:
    """Gradient of the objective, sharded like params, and metrics.

    `tokens` [M, rows, T + 1] are M micro-batches of text, each token the target of the one before;
    or a batch of any other task, see model/objectives.py, each of its arrays [M, rows, …], targets
    of each loop [M, rows, N, T].
    """
    model, axes = config.model, sharding.batch_axes(mesh)
    specs = sharding.manual_specs(mesh, transformer.weights(model))
    attend = attention_kernels.for_mesh(model, mesh, training=True)
    taps = closed_taps(model) if inside else None
    asked = objectives.of(model)

    def objective(full: Params, taps: Array | None, rows: Array | Batch) -> tuple[Array, Metrics]:
        batch = objectives.batch_of(rows)
        probe = BLIND if taps is None else Taps(taps)
        states = transformer.forward(
            model,
            full,
            batch["inputs"],
            return_loops=asked.loops(model),
            probe=probe,
            attend=attend,
        )
        nats = asked.nats(model, full, states.hidden, batch)
        tokens = objectives.count(batch)
        return asked.total(model, nats), {
            "loop_losses": nats,
            "tokens": tokens.astype(jnp.float32),
            "norms": states.norms,
            "layer_norms": states.seen,
        }

    differentiate = jax.grad(objective, argnums=(0, 1), has_aux=True)

    def local(shards: Params, tokens: Array | Batch) -> tuple[Params, Metrics]:
        full = sharding.gather(shards, specs)

        def micro_batch(total, rows):
            (grads, squares), sums = differentiate(full, taps, rows)
            return jax.tree.map(jnp.add, total, (grads, {"squares": squares, **sums})), None

        first = jax.tree.map(lambda rows: rows[0], tokens)
        (grads, squares), sums = jax.eval_shape(differentiate, full, taps, first)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (grads, {"squares": squares, **sums})
        )
        (grads, sums), _ = jax.lax.scan(micro_batch, zeros, tokens)
        sums = jax.lax.psum(sums, axes)
        passes = len(jax.tree.leaves(tokens)[0]) * sharding.batch_devices(mesh)
        grads = {name: _reduce(g, specs[name], axes) / sums["tokens"] for name, g in grads.items()}
        losses = sums["loop_losses"] / sums["tokens"]
        metrics = {
            "loss": losses[-1],
            "objective": asked.total(model, losses),
            "loop_losses": losses,
            "norms": sums["norms"] / passes,
        }
        if inside:
            arriving = jnp.sqrt(sums["squares"]) / sums["tokens"]
            metrics["inside"] = {
                **{f"gradient_{name}": arriving[..., i] for i, name in enumerate(TAPS)},
                "stream_norm": sums["layer_norms"] / passes,
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


def _reduce(grad: Array, spec: P, axes: tuple[str, ...]) -> Array:
    for axis, name in enumerate(spec):
        if name is not None:
            grad = jax.lax.psum_scatter(grad, name, scatter_dimension=axis, tiled=True)
    rest = tuple(axis for axis in axes if axis not in spec)
    return jax.lax.psum(grad, rest)
