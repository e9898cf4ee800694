"""What every loop does to states and predictions, token by token.

K loops, B rows, T time, D width, V vocabulary. Loop k means: after k loops, counted from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config.resolved import ModelConfig
from looped_jax.model import loss, transformer
from looped_jax.model.transformer import Params
from looped_jax.runtime import sharding

Array = jax.Array
LOGITS_AT_ONCE = 2**22  # of one loop; two loops' are alive together


@dataclass(frozen=True)
class TokenMeasurements:
    """Measurements of B · T tokens.

    inputs: [B, T]
    targets: [B, T], or [K, B, T] after each loop its own; those < 0 are left out of every mean
    nats, entropy, confidence: [K, B, T] loss of the target, entropy and top probability, in nats
    prediction: [K, B, T] likeliest token
    kl: [K − 1, B, T] KL(after loop k + 1 ‖ after loop k) in nats
    cosine, change: [K − 1, B, T] of consecutive normalised states: their cosine, and the length of
    their difference over the earlier one's
    """

    inputs: np.ndarray
    targets: np.ndarray
    nats: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray
    prediction: np.ndarray
    kl: np.ndarray
    cosine: np.ndarray
    change: np.ndarray

    @property
    def loops(self) -> int:
        return len(self.nats)

    @property
    def last_targets(self) -> np.ndarray:
        """Those after the last loop, [B, T]."""
        return self.targets if self.targets.ndim == 2 else self.targets[-1]

    @property
    def counted(self) -> np.ndarray:
        """Which tokens have a target, [B, T]."""
        return self.last_targets >= 0

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of [N, B, T] over the counted tokens, float64 [N]."""
        return values[:, self.counted].astype(np.float64).mean(axis=1)

    def by_position(self, values: np.ndarray) -> np.ndarray:
        """Mean of [N, B, T] at each position, float64 [N, T]; NaN where no token is counted."""
        sums = np.where(self.counted, values.astype(np.float64), 0).sum(axis=1)
        with np.errstate(invalid="ignore"):
            return sums / self.counted.sum(axis=0)

    def correct(self) -> np.ndarray:
        """Whether the prediction is the target, [K, B, T]."""
        return self.prediction == self.targets

    def agreement(self) -> np.ndarray:
        """Whether consecutive loops predict the same token, [K − 1, B, T]."""
        return self.prediction[1:] == self.prediction[:-1]

    def settled(self) -> np.ndarray:
        """The loop, 1 … K, after which a token's prediction changes no more, [B, T]."""
        changed = ~self.agreement()
        loops = np.arange(2, self.loops + 1)[:, None, None]
        return np.max(np.where(changed, loops, 1), axis=0, initial=1)


def measure(
    config: ModelConfig,
    params: Params,
    batches: Sequence[dict[str, np.ndarray]],
    *,
    loops: int,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TokenMeasurements:
    """Measure validation batches {inputs, targets} [rows, T] at 1 … `loops` loops, in one pass.

    Targets may be [rows, loops, T], each loop's own.
    Rows are sharded over the batch devices of `mesh`, one device by default.
    """
    mesh = mesh or sharding.one_device()
    step, spec = make_measure_step(config, mesh, loops), P(sharding.BATCH_AXES)
    params = jax.device_put(params, transformer.shardings(config, mesh))
    found: list[dict[str, np.ndarray]] = []
    for number, batch in enumerate(batches, start=1):
        rows = [sharding.fill_rows(batch[name], mesh) for name in ("inputs", "targets")]
        measured = jax.device_get(step(params, *(sharding.put(r, mesh, spec) for r in rows)))
        count = len(batch["inputs"])
        found.append({name: values[:, :count] for name, values in measured.items()})
        progress(number, len(batches))
    return TokenMeasurements(
        inputs=np.concatenate([batch["inputs"] for batch in batches]),
        targets=_loops_first(np.concatenate([batch["targets"] for batch in batches])),
        **{name: np.concatenate([f[name] for f in found], axis=1) for name in found[0]},
    )


def _loops_first(targets: Any) -> Any:
    """[B, K, T] as [K, B, T]; [B, T] as it is."""
    return targets if targets.ndim == 2 else targets.swapaxes(0, 1)


def make_measure_step(config: ModelConfig, mesh: Mesh, loops: int) -> jax.stages.Wrapped:
    """Jitted (params, inputs, targets) -> TokenMeasurements' other fields by name; see measure."""
    run = transformer.make_hidden_states(config, mesh, tuple(range(1, loops + 1)))
    rows, of_loops = P(sharding.BATCH_AXES), P(None, sharding.BATCH_AXES)

    def step(params: Params, inputs: Array, targets: Array) -> dict[str, Array]:
        return _measured(config, params, run(params, inputs), _loops_first(targets))

    program = transformer.on_mesh(
        config,
        mesh,
        step,
        in_specs=(rows, rows),
        out_specs=of_loops,
    )
    return jax.jit(program, out_shardings=NamedSharding(mesh, P()))


def _measured(
    config: ModelConfig, params: Params, states: Array, targets: Array
) -> dict[str, Array]:
    """Measurements of states [K, B, T, D], by name; targets [B, T] or [K, B, T]."""
    loops, rows, time, _ = states.shape
    tokens = rows * time
    hidden = states.reshape(loops, tokens, -1)
    chunk = min(max(1, LOGITS_AT_ONCE // config.padded_vocab), tokens)
    fill = -tokens % chunk
    chunks = jnp.pad(hidden, ((0, 0), (0, fill), (0, 0))).reshape(
        loops, -1, chunk, hidden.shape[-1]
    )
    y = jnp.broadcast_to(jnp.maximum(targets, 0), (loops, rows, time)).reshape(loops, tokens)
    y = jnp.pad(y, ((0, 0), (0, fill))).reshape(loops, -1, chunk)

    def of_chunk(arguments: tuple[Array, Array]):
        def of_loop(previous: Array, of_loop: tuple[Array, Array]):
            h, y = of_loop  # [chunk, D], [chunk]
            log_p = jax.nn.log_softmax(loss.logits(config, params, h))
            p = jnp.exp(log_p)
            return log_p, {
                "nats": -jnp.take_along_axis(log_p, y[:, None], axis=-1)[:, 0],
                "entropy": -jnp.sum(p * log_p, axis=-1),
                "confidence": p.max(axis=-1),
                "prediction": log_p.argmax(axis=-1).astype(jnp.int32),
                "kl": jnp.sum(p * (log_p - previous), axis=-1),
            }

        nothing = jnp.zeros((chunk, config.vocab_size or 0))
        return jax.lax.scan(of_loop, nothing, arguments)[1]  # over K

    by_chunk = jax.lax.map(
        of_chunk, (chunks.swapaxes(0, 1), y.swapaxes(0, 1))
    )  # each [chunks, K, chunk]
    found = {
        name: values.swapaxes(0, 1).reshape(loops, -1)[:, :tokens].reshape(loops, rows, time)
        for name, values in by_chunk.items()
    }
    found["kl"] = found["kl"][1:]
    states = states.astype(jnp.float32)
    before, after = states[:-1], states[1:]
    norms = jnp.linalg.norm(states, axis=-1)
    found["cosine"] = jnp.sum(before * after, axis=-1) / (norms[:-1] * norms[1:])
    found["change"] = jnp.linalg.norm(after - before, axis=-1) / norms[:-1]
    return found
