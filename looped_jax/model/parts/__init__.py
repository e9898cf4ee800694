"""The parts that come with this package, one technique in each file; see model/parts/base.py."""

from looped_jax.model.parts import (
    backout,
    biases,
    branch_gains,
    carried_scale,
    coda,
    damping,
    dropout,
    exit_gate,
    hyper_connections,
    kv_shift,
    learned_positions,
    loop_adapters,
    loop_embedding,
    loop_gains,
    loop_lora,
    prelude,
    residual_scalars,
    residual_scale,
    sandwich_norm,
    smear,
    state_init,
    state_noise,
    value_embedding,
)

__all__ = [
    "backout", "biases", "branch_gains", "carried_scale", "coda", "damping", "dropout",
    "exit_gate", "hyper_connections", "kv_shift", "learned_positions", "loop_adapters",
    "loop_embedding", "loop_gains", "loop_lora", "prelude", "residual_scalars", "residual_scale",
    "sandwich_norm", "smear", "state_init", "state_noise", "value_embedding",
]  # fmt: skip
