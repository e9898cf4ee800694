"""A part: one technique, at named sites of the model, in one file.

A part is a small module with its settings, its weights (which say their axes and optimizer group,
see model/weights.py) and a method for each site where it acts. A model without it is the same
program as before the part existed. model/parts/ holds those that come with this package;
CONTRIBUTING.md shows how to add one. Weights that are no matrix of a product, such as gains and the
kernels of convolutions, are of the group "vector", or of one of the part's own: Muon is for
matrices. What a part has to know of the loop before, beside the state, it keeps in `here.carried`.

Sites, in the order in which a token meets them (B batch, T time, D width). Those of the model are
for parts with each_layer = False, those of a layer for the others, `entry` for both:

entry             e [B, T, D]      once, after the embedding and before the loops
initial_state     h [B, T, D]      of the model: once, the state that the first loop starts from,
                                   zero without a part; with one, rules treat the first loop as
                                   every other
loop_start        x [B, T, D]      of the model: at the start of every loop, after the loop rule
layer_start       x [B, T, D]      of the model: before each looped layer, with its index in `here`
stream            x [B, T, D]      before each branch of a layer
attention_input   x [B, T, D]      normalised input of keys and values
product           [B, T, out]      x @ w of any matrix of a layer; `here` names the matrix and
                                   holds x [B, T, in]
query, key, value [B, T, heads, Dh] before position and norm; `here.source` is the normalised
                                   input [B, T, D] of keys and values
attention_weights [B, H, T, T]     float32, after the softmax, in training alone: no fused kernel
                                   holds them, so that a part here lets plain attention take over
mixed             [B, T, H, Dh]    what attention has gathered, before it is projected
attention_output, mlp_output  [B, T, D] what a branch adds to the stream
attention_sum     x [B, T, D]      the stream after attention
mlp_input         x [B, T, D]      normalised input of the MLP
block_output      x [B, T, D]      the stream after a layer
layer_end         x [B, T, D]      of the model: after each looped layer, likewise
loop_end          x [B, T, D]      of the model: after the last layer, before the closing norm
exit              h [B, T, D]      of the model: for each loop count that is read, before the head;
                                   `here.carried` is as its last loop left it
stop              z [...]          of the model: float32 logits, 0 without a part, of leaving after
                                   a loop; `here` holds the states h [..., D] that it left, alone
readout           z [..., Vp]      of the model: float32 logits before the soft cap, of some tokens
                                   of any loops; `here` holds their states h [..., D] alone
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from looped_jax.config.options import setting
from looped_jax.config.registry import PARTS
from looped_jax.config.resolved import ModelConfig
from looped_jax.errors import ConfigError
from looped_jax.model.linear import linear
from looped_jax.model.norm import rms_norm
from looped_jax.model.random_numbers import RandomNumbers

Array = jax.Array
OF_MODEL = (
    "entry", "initial_state", "loop_start", "layer_start", "layer_end", "loop_end", "exit", "stop",
    "readout",
)  # fmt: skip
NORMED = "normed"  # in Here.entry: loops start from e as it is, normed already or meant so
ON_WEIGHTS = "attention_weights"
OF_LAYER = (
    "entry", "stream", "attention_input", "product", "query", "key", "value",
    ON_WEIGHTS, "mixed", "attention_output", "attention_sum", "mlp_input", "mlp_output",
    "block_output",
)  # fmt: skip


@dataclass(frozen=True)
class PartSettings:
    """What every part can be told; a part adds its own."""

    on: bool = setting(False, "whether the model has it")

    def longest_row(self, seq_len: int) -> int | None:
        """Tokens that a row may have at most, where a part knows no later positions."""
        del seq_len
        return None


class History(Protocol):
    """Everything that looks at other tokens goes through here, in a full pass and in decoding.

    writes: whether it notes what it is shown, so that nothing may be shown to it a second time
    """

    writes: bool

    def attend(self, query: Array, key: Array, value: Array, window: int | None) -> Array:
        """Causal attention, [B, T, H, Dh] over [B, T, G, Dh]; see model/attention_kernels.py."""
        ...

    def previous(self, name: str, x: Array, offset: int) -> Array:
        """x [B, T, …] as it was `offset` positions earlier, zero before the first.

        `name` tells the streams of one part and site apart; give each x a name of its own.
        """
        ...

    def at(self, place: str) -> History:
        """The history of one part at one site, or of the loop rule."""
        ...

    def with_weights(self, act: Callable[[Array], Array]) -> History:
        """The same in a full pass, whose attention weights [B, H, T, T] are act(weights)."""
        ...


class Here(NamedTuple):
    """What a part or a loop rule sees of the place it stands in.

    tokens: [B, T]
    e: [B, T, D] embedded tokens, after the entry
    h: [B, T, D] state after the previous loop, in the first loop the initial one
    loop: traced index of the loop, from 0; first: traced, whether no state was before it
    layer: index from 0, or None outside of layers
    history: see History; entry: what parts left at the entry for later, by name
    carried: what parts hand from loop to loop beside h, by name: pytrees of [B, T, …], zero in the
    first loop. A part says at the entry what its own is like, and replaces it in every loop
    positions: of the tokens in their sequences, [T] or [B, T]
    rope: rotary tables of the positions, or None; see block.rope_tables
    matrix: name of the matrix whose product it is; source: what it was multiplied with, see `query`
    random: see model/random_numbers.py, None where nothing draws; place: site and part that ask
    """

    tokens: Any = None
    e: Any = None
    h: Any = None
    loop: Any = None
    first: Any = None
    layer: int | None = None
    history: Any = None
    entry: Any = None
    carried: Any = None
    positions: Any = None
    rope: Any = None
    matrix: str | None = None
    source: Any = None
    random: RandomNumbers | None = None
    place: str = ""

    def at(self, place: str) -> Here:
        """The same, with the history and random numbers of a part at a site, or of the rule."""
        return self._replace(history=self.history and self.history.at(place), place=place)

    @property
    def x0(self) -> Array:
        """norm(e) [B, T, D], what a loop starts from; e where the entry or model.norm says so."""
        return self.e if NORMED in (self.entry or ()) else rms_norm(self.e)

    @property
    def training(self) -> bool:
        """For what draws: whether rows have seeds of their own, as in training alone."""
        return self.random is not None and self.random.training

    def draw(self, sampler: Callable[..., Array], *arguments: Any) -> Array:
        """Of every token sampler(key, *arguments), as draw(jax.random.normal, (width,)).

        [B, T, …], or [1, T, …] where rows have no seeds of their own (see training).
        Of a part or rule with `draws = True`; one that asks twice at a site draws the same twice.
        """
        if self.random is None:
            raise TypeError(
                f"{self.place} draws random numbers: let its class say draws = True, and draw at a "
                "site that knows the tokens"
            )
        return self.random.draw(
            sampler, *arguments, place=self.place, loop=self.loop, layer=self.layer
        )


class Part(nnx.Module):
    """Base of all parts. Subclasses have a method `site(x, here) -> x` for each of their sites."""

    Settings = PartSettings
    each_layer = True  # one in every layer, else one for the model
    starts_as_identity = True  # a fresh model computes what it computes without the part
    draws = False  # random numbers, by here.draw
    in_unlooped = False  # layers of prelude and coda, which run once, have it too

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Raise TypeError for a class that acts at no site, or at one that nobody will call."""
        super().__init_subclass__(**arguments)
        sites = OF_LAYER if cls.each_layer else OF_MODEL
        acts = [n for n, v in vars(cls).items() if callable(v) and n[0] != "_" and n != "Settings"]
        if wrong := [name for name in acts if name not in sites]:
            scope = "each layer" if cls.each_layer else "the model"
            raise TypeError(
                f"part {cls.__name__} of {scope} acts at {', '.join(wrong)}, which is no site of "
                f"{scope}: {', '.join(sites)}; correct it, begin its name with _, or set each_layer"
            )
        if not any(callable(getattr(cls, site, None)) for site in sites):
            raise TypeError(
                f"part {cls.__name__} acts at no site; give it one of {', '.join(sites)}"
            )

    def __init__(self, settings: Any, config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs):
        """`layer` is None for a part of the model. Random numbers come from rngs.parts()."""


def of_loop(weights: nnx.Param, here: Here) -> Array:
    """The loop's own of weights [K, …]; beyond the trained K, those of the last loop."""
    return weights[...][jnp.minimum(here.loop, len(weights[...]) - 1)]


def times_of_loop(x: Array, weights: nnx.Param, here: Here) -> Array:
    """x [B, T, in] times the loop's own of matrices [K, in, out]; see of_loop."""
    own = of_loop(weights, here)
    of_rows = jnp.ndim(here.loop) > 0  # rows may be in different loops, as [B, 1]
    return jax.vmap(linear)(x, own[:, 0]) if of_rows else linear(x, own)


def refuse_other_norms(part: str, config: ModelConfig) -> None:
    """Raise ConfigError for a part that takes rms(x) · norm(x) for x, where that is not so."""
    if not config.norm.keeps_direction:
        raise ConfigError(
            f"model.parts.{part} finds the stream x again as rms(x) · norm(x), and model.norm="
            f"{config.norm} changes its direction; leave the part out, or take model.norm.kind=rms "
            "without gain and bias"
        )


def make_parts(config: ModelConfig, layer: int | None, *, rngs: nnx.Rngs) -> nnx.Dict:
    """The parts that are on, by name: those of a layer, or with None those of the model.

    Their random numbers are a stream of their own, so that other weights start as without them.
    """
    found = {}
    for name, settings in config.parts.items():
        kind = PARTS[name]
        if settings.on and kind.each_layer == (layer is not None):
            found[name] = kind(settings, config, layer, rngs=rngs)
    return nnx.Dict(found)


def through(
    parts: Mapping[str, Part], site: str, x: Array, here: Here, *, place: str | None = None
) -> Array:
    """x after every part that acts at `site`, by the order of their names.

    `place` tells apart where a site comes twice.
    """
    for name, part in parts.items():
        act = getattr(part, site, None)
        if act is not None:
            x = act(x, here.at(f"{place or site}.{name}"))
    return x


def on_weights(parts: Mapping[str, Part], here: Here) -> Callable[[Array], Array] | None:
    """What parts do to attention weights [B, H, T, T] in training, or None where none does."""
    if not here.training or not any(hasattr(part, ON_WEIGHTS) for part in parts.values()):
        return None
    return lambda weights: through(parts, ON_WEIGHTS, weights, here)
