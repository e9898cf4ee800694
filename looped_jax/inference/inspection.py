"""One pass with a view inside: logits, whatever the model computes on its way, and edits of it.

    run = m.run("the cat sat", loops=(1, 4), record=("state", "weights"), layers=(0,))
    run.logits[4], run.seen["weights"]                   # [B, T, V]; [K, layers, B, H, T, T]
    m.run(ids, edit=Edit("state", h, loop=2))            # go on from another state after loop 2
    m.run(ids, loops=8, start=(3, h))                    # or leave the first three loops out

Loops are counted from 1 here, as loop counts are everywhere; layers from 0, as in the names of
weights. What can be recorded and edited, and its shapes, stands in model/probe.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from looped_jax.config.resolved import Config, ModelConfig
from looped_jax.data.tokenizer import Tokenizer
from looped_jax.errors import ArgumentError
from looped_jax.model import loss, probe, transformer
from looped_jax.model.transformer import Params

Array = jax.Array


class Model(Protocol):
    """What is studied; see inference/trained_model.py."""

    config: Config
    params: Params

    @property
    def tokenizer(self) -> Tokenizer: ...


@dataclass(frozen=True, eq=False)
class Edit:
    """Something to put in place of what the model computes, before it is used.

    name: one of probe.NAMES; value: a function x -> x, or an array that is broadcast to x, or to
    x at `position`
    loop: from 1, every loop if None; layer: from 0, every layer if None; position: of the row, of
    the query for "weights", all if None
    """

    name: str
    value: Callable[[Array], Array] | np.ndarray | Array | float
    loop: int | None = None
    layer: int | None = None
    position: int | None = None


@dataclass(frozen=True)
class Run:
    """What one pass gave. B rows, T tokens, V vocabulary, K loops run, L layers recorded.

    tokens: int32 [B, T]; logits: float32 [B, T, V] by loop count; states: [B, T, D] that they were
    read from, by loop count
    seen: what was recorded by name, [K, …] of a loop and [K, L, …] of a layer, in the order of the
    `layers` asked for; the first of the K is the first loop that was run
    """

    tokens: np.ndarray
    logits: dict[int, Array]
    states: dict[int, Array]
    seen: dict[str, Array]


def study(
    model: Model,
    tokens: str | Sequence[str] | np.ndarray,
    *,
    loops: int | Sequence[int] | None,
    record: Sequence[str],
    layers: Sequence[int] | None,
    positions: Sequence[int] | None,
    edits: tuple[Edit, ...],
    start: tuple[int, np.ndarray] | None,
) -> Run:
    """See TrainedModel.run. Attention is computed plainly, in float32 at its softmax.

    Raises ArgumentError that names the argument.
    """
    config = model.config.model
    ids, counts = token_ids(model, tokens), loop_counts(model, loops)
    record = (record,) if isinstance(record, str) else tuple(record)
    done, state = (0, None) if start is None else (start[0], jnp.asarray(start[1], config.dtype))
    if not 0 <= done < min(counts):
        raise ArgumentError(f"start={done} loops leave none to run up to loops={counts}")
    shape = (*ids.shape, config.width)
    if state is not None and state.shape != shape:
        raise ArgumentError(f"start holds a state of shape {state.shape}; give {shape}")
    _check(config, ids.shape[1], (done, max(counts)), record, layers, positions, edits)
    # Programs are kept by what is edited where; which loop, and to what, is data.
    places = tuple(
        (e.name, e.layer, e.position, e.value if callable(e.value) else None) for e in edits
    )
    values = tuple(None if callable(e.value) else jnp.asarray(e.value) for e in edits)
    of_loop = jnp.array([-1 if e.loop is None else e.loop - 1 for e in edits], jnp.int32)
    run = _program(config, counts, done, record, _tuple(layers), _tuple(positions), places)
    hidden, logits, seen = run(model.params, ids, state, values, of_loop)
    return Run(
        ids,
        dict(zip(counts, logits, strict=True)),
        dict(zip(counts, hidden, strict=True)),
        seen or {},
    )


@functools.lru_cache(maxsize=64)
def _program(
    config: ModelConfig,
    counts: tuple[int, ...],
    done: int,
    record: tuple[str, ...],
    layers: tuple[int, ...] | None,
    positions: tuple[int, ...] | None,
    places: tuple[tuple, ...],
) -> jax.stages.Wrapped:
    def run(
        params: Params, tokens: Array, state: Array | None, values: tuple, of_loop: Array
    ) -> tuple:
        def edit(name: str, loop: Array, layer: int | None, x: Array) -> Array:
            for number, (at, of_layer, position, function) in enumerate(places):
                if at == name and of_layer in (None, layer):
                    changed = _edited(x, at, position, function, values[number])
                    now = (of_loop[number] < 0) | (of_loop[number] == loop)
                    x = jnp.where(now, changed, x)
            return x

        recorder = probe.Recorder(
            record, edit if places else None, [place[0] for place in places], layers, positions
        )
        params = transformer.cast(params, config.dtype)
        states = transformer.forward(
            config,
            params,
            tokens,
            loops=max(counts),
            return_loops=tuple(k - 1 for k in counts),
            probe=recorder if record or places else probe.BLIND,
            start=state,
            done=done,
        )
        return states.hidden, loss.logits(config, params, states.hidden), states.seen

    return jax.jit(run)


def _edited(
    x: Array, name: str, position: int | None, function: Callable | None, value: Array | None
) -> Array:
    axis = 2 if name == "weights" else 1
    at = (slice(None),) * axis + (slice(None) if position is None else position,)
    old = x[at]
    new = jnp.asarray(value if function is None else function(old)).astype(x.dtype)
    try:
        return x.at[at].set(jnp.broadcast_to(new, old.shape))
    except ValueError as error:
        raise ArgumentError(
            f"edit of {name}: a value of shape {new.shape} does not fit {old.shape}"
        ) from error


def token_ids(model: Model, tokens: Any) -> np.ndarray:
    """int32 [B, T] of ids [B, T] or [T], a text, or texts of equal length in tokens.

    Raises ArgumentError for ids that the vocabulary does not hold, and for anything else.
    """
    if isinstance(tokens, str):
        tokens = [tokens]
    if isinstance(tokens, Sequence) and tokens and all(isinstance(t, str) for t in tokens):
        rows = [model.tokenizer.prompt(text) for text in tokens]
        if len({len(row) for row in rows}) > 1:
            raise ArgumentError(
                f"texts of {sorted({len(row) for row in rows})} tokens make no rows of one length; "
                "give them one by one, or ids that you have padded"
            )
        model.config.model.check_row(len(rows[0]))
        return np.array(rows, np.int32)
    try:
        ids = np.asarray(tokens)
    except ValueError:
        ids = np.zeros(0)
    if ids.ndim not in (1, 2) or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ArgumentError(
            f"tokens of type {type(tokens).__name__}, shape {ids.shape} and {ids.dtype} are no "
            "tokens; give a text, texts, or whole-number ids [B, T] or [T]"
        )
    size = model.config.model.vocab_size
    if ids.min() < 0 or ids.max() >= size:
        wrong = ids[(ids < 0) | (ids >= size)].flat[0]
        raise ArgumentError(f"token {wrong} is none of the vocabulary's 0 to {size - 1}")
    model.config.model.check_row(ids.shape[-1])
    return np.atleast_2d(ids).astype(np.int32)


def loop_counts(model: Model, loops: int | Sequence[int] | None) -> tuple[int, ...]:
    """Loop counts as given, one or several; the trained one for None. Raises ArgumentError."""
    if loops is None:
        return (model.config.model.loops,)
    counts = (loops,) if isinstance(loops, int | np.integer) else tuple(loops)
    if not counts or not all(isinstance(k, int | np.integer) and k >= 1 for k in counts):
        raise ArgumentError(f"loops={loops!r} must be whole numbers from 1, as 4 or (1, 4, 8)")
    return tuple(int(k) for k in counts)


def _tuple(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(int(v) for v in values)


def _check(
    config: ModelConfig,
    time: int,
    loops: tuple[int, int],
    record: tuple[str, ...],
    layers: Sequence[int] | None,
    positions: Sequence[int] | None,
    edits: tuple[Edit, ...],
) -> None:
    for name in (*record, *(edit.name for edit in edits)):
        if name not in probe.NAMES:
            raise ArgumentError(
                f"{name!r} is nothing that can be seen; choose from {', '.join(probe.NAMES)}"
            )
    if layers is not None and not len(tuple(layers)):
        raise ArgumentError("layers=() asks for nothing; leave it out for all of them")
    if any(e.name == "state" for e in edits) and (names := transformer.carried_names(config)):
        raise ArgumentError(
            f"edit of 'state': {', '.join(names)} hands on what the loop left before; edit "
            "'block' of the last layer, which comes before"
        )
    chosen = [("layers", layer, config.layers) for layer in layers or ()]
    chosen += [("positions", place, time) for place in positions or ()]
    for edit in edits:
        if edit.loop is not None and not loops[0] < edit.loop <= loops[1]:
            raise ArgumentError(f"edit of loop {edit.loop}: loops are {loops[0] + 1} to {loops[1]}")
        if edit.layer is not None and edit.name in probe.OF_LOOP:
            raise ArgumentError(f"edit of {edit.name!r}: it belongs to a loop, so give no layer")
        if edit.layer is not None:
            chosen.append(("edit of layer", edit.layer, config.layers))
        if edit.position is not None:
            chosen.append(("edit of position", edit.position, time))
    for what, index, size in chosen:
        if not -size <= index < size or (index < 0 and "layer" in what):
            raise ArgumentError(f"{what}: {index} is none of 0 to {size - 1}")
