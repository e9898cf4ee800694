"""Looking into the loop: gradient taps for training, recorded and edited values for study.

Every loop opens a view; the model shows it what it computes, by name and layer, and goes on with
what the view returns. Without a probe nothing is shown and the program is the same.

Names, in the order in which they are computed (B batch, T time, D width):
  start                [B, T, D]  stream at the start of a loop
  query, key, value    [B, T, heads, Dh]  after position and norm, as attention uses them
  weights              [B, H, T, T]  float32, of each query (second to last axis) over keys
  attention, mlp       [B, T, D]  what a branch adds to the stream
  block                [B, T, D]  the stream after a layer
  state                [B, T, D]  normalised state after a loop, what the head reads
`start` and `state` belong to a loop, all others to a loop and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from looped_jax.config.resolved import ModelConfig

Array = jax.Array
OF_LOOP = ("start", "state")
OF_LAYER = ("query", "key", "value", "weights", "attention", "mlp", "block")
NAMES = ("start", *OF_LAYER, "state")
TAPS = ("attention", "mlp", "block")  # where gradients are tapped


class View(Protocol):
    """One loop's sight of the model, made while the loop is traced."""

    def __call__(self, name: str, layer: int | None, x: Array) -> Array:
        """What the model goes on with in place of x."""
        ...

    def wants(self, name: str) -> bool:
        """Whether it looks at what is expensive to show."""
        ...

    def seen(self) -> Any:
        """What is kept of this loop: a pytree, stacked over loops."""
        ...


class Probe(Protocol):
    """inputs: a pytree whose leaves have a first axis of K loops, or None; a loop sees its own."""

    inputs: Any

    def view(self, loop: Array, inputs: Any) -> View:
        """The sight of one loop, of a traced index from 0."""
        ...


class Blind:
    """The probe, and the view, that sees nothing."""

    inputs: Any = None

    def view(self, loop: Array, inputs: Any) -> View:
        return self

    def __call__(self, name: str, layer: int | None, x: Array) -> Array:
        return x

    def wants(self, name: str) -> bool:
        return False

    def seen(self) -> Any:
        return None


BLIND = Blind()


class Taps:
    """Gradient norms of every loop and layer from the one backward pass that trains anyway.

    A tap is a scalar that rides beside a tensor through the forward pass and changes nothing. In
    the backward pass it receives the squared norm of the gradient that arrives there. Fed to the
    scan as input, taps [K, L, 3] tell every loop and layer apart, without keeping an activation.
    Also keeps the mean norm of the stream after each layer, [K, L].
    """

    def __init__(self, taps: Array):
        self.inputs = taps

    def view(self, loop: Array, inputs: Array) -> View:
        return _TapView(inputs)


class _TapView(Blind):
    def __init__(self, taps: Array):
        self._taps, self._streams = taps, list[Array]()

    def __call__(self, name: str, layer: int | None, x: Array) -> Array:
        if name not in TAPS or layer is None:
            return x
        x = _tapped(x, self._taps[layer][TAPS.index(name)])
        if name == "block":
            self._streams.append(x)
        return x

    def seen(self) -> Array:
        return jnp.stack([mean_norm(x) for x in self._streams])


def closed_taps(config: ModelConfig, loops: int | None = None) -> Array:
    """Taps to differentiate by: zeros float32 [K, L, 3], the last axis as TAPS names it."""
    return jnp.zeros((loops or config.loops, config.layers, len(TAPS)), jnp.float32)


@jax.custom_vjp
def _tapped(x: Array, scalar: Array) -> Array:
    return x


def _forward(x: Array, scalar: Array) -> tuple[Array, None]:
    return x, None


def _backward(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient, jnp.sum(jnp.square(gradient.astype(jnp.float32)))


_tapped.defvjp(_forward, _backward)


def mean_norm(x: Array) -> Array:
    """Mean over tokens of the L2 norm of x [B, T, D], float32."""
    return jnp.mean(jnp.linalg.norm(x.astype(jnp.float32), axis=-1))


Edit = Callable[[str, Array, "int | None", Array], Array]


class Recorder:
    """Keeps what is asked for by name, and lets it be replaced before it is used.

    record: names to keep, [K, …] each, [K, L, …] of layers; of some layers or positions alone where
    these are given. edit: (name, loop, layer, x) -> x, with a traced loop from 0; it is shown the
    names that stand in `edited` alone.
    """

    inputs = None

    def __init__(
        self,
        record: Sequence[str],
        edit: Edit | None = None,
        edited: Sequence[str] = (),
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ):
        self.record, self.edit, self.edited = tuple(record), edit, tuple(edited)
        self.layers, self.positions = layers, positions

    def view(self, loop: Array, inputs: None) -> View:
        return _RecorderView(self, loop)


class _RecorderView(Blind):
    def __init__(self, recorder: Recorder, loop: Array):
        self._recorder, self._loop = recorder, loop
        self._kept: dict[str, dict[int | None, Array]] = {name: {} for name in recorder.record}

    def __call__(self, name: str, layer: int | None, x: Array) -> Array:
        recorder = self._recorder
        if recorder.edit is not None and name in recorder.edited:
            x = recorder.edit(name, self._loop, layer, x)
        asked = recorder.layers is None or layer is None or layer in recorder.layers
        if name in self._kept and asked:
            kept = x
            if recorder.positions is not None:
                kept = (
                    x[:, :, recorder.positions] if name == "weights" else x[:, recorder.positions]
                )
            self._kept[name][layer] = kept
        return x

    def wants(self, name: str) -> bool:
        return name in (*self._recorder.record, *self._recorder.edited)

    def seen(self) -> dict[str, Array]:
        order = self._recorder.layers
        return {
            name: kept[None]
            if name in OF_LOOP
            else jnp.stack([kept[layer] for layer in (kept if order is None else order)])
            for name, kept in self._kept.items()
        }
