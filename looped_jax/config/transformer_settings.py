"""Settings of the transformer inside the loops: norms, MLP, positions, queries, windows, starts.

With their defaults it is the Fully Looped Transformer's; nanochat's and GPT-2's
values are in docs/model_settings.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from looped_jax.config.options import at_least, one_of, setting, share

DTYPES = ("float32", "bfloat16")
NORM_PLACES = ("after_rope", "before_rope", "none")
ACTIVATIONS = ("relu2", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class NormSettings:
    """The norm before each branch of a layer, and the one that closes a loop.

    Other norms, of queries and keys, in loop rules and in parts, are root mean squares as ever.
    """

    kind: str = one_of(
        ("rms", "layer"), "rms", "x / rms(x), or layer: of x less its mean over channels"
    )
    gain: bool = setting(False, "whether it is multiplied by learned weights, 1 at the start")
    bias: bool = setting(False, "whether learned weights are added, 0 at the start")
    eps: float | None = at_least(
        0.0, None, "added to the mean square; by default 1.1920929e-7, of float32"
    )
    embedding: bool = setting(True, "whether loops start from norm(e); else from e as it is")

    @property
    def keeps_direction(self) -> bool:
        """Whether it only scales a stream, so that rms(x) · norm(x) is the stream again."""
        return self.kind == "rms" and not self.gain and not self.bias


@dataclass(frozen=True)
class MLPSettings:
    """Of the MLP, whose hidden width is 4 D."""

    activation: str = one_of(
        ACTIVATIONS, "relu2", "of hidden units: relu(x)², gelu by erf, or gelu_tanh"
    )


@dataclass(frozen=True)
class RopeSettings:
    """Rotary positions: channels j and j + Dh / 2 turn by position · base ** (−2 j / Dh)."""

    on: bool = setting(True, "whether queries and keys turn at all")
    base: float = at_least(
        1.0, 10_000.0, "of the wavelengths, from 2 π to nearly 2 π · base tokens"
    )
    dtype: str = one_of(
        DTYPES, "bfloat16", "that cosines and sines are rounded to, whatever model.dtype is"
    )


@dataclass(frozen=True)
class QKSettings:
    """Queries and keys, before they meet; the scores are also divided by √Dh."""

    norm: str = one_of(NORM_PLACES, "after_rope", "where their norm over a head is")
    scale: float = at_least(0.0, 1.0, "that queries and keys are each multiplied with, last")


@dataclass(frozen=True)
class ShortWindowSettings:
    """What layers of S in window_pattern see."""

    share: float = share(0.25, "of seq_len, rounded down")
    tokens: int | None = at_least(1, None, "in tokens, instead of a share")
    multiple: int = at_least(1, 1, "that the window is rounded up to, as 128 for a kernel's tiles")
    beside_itself: bool = setting(False, "whether a token sees itself beside these, not among them")

    def keys(self, seq_len: int) -> int:
        """How many keys a query sees, itself included, where rows have `seq_len` tokens."""
        # Rounded first: 0.29 · 100 is 28.999… in floating point.
        window = round(seq_len * self.share, 6) if self.tokens is None else self.tokens
        window = math.floor(window) if self.multiple == 1 else math.ceil(window / self.multiple)
        return max(window * self.multiple, 1) + self.beside_itself


@dataclass(frozen=True)
class InitSettings:
    """How weights start; those that are not named here have a variance of 1 / inputs, uniform."""

    embedding_std: float | None = at_least(
        0.0, None, "normal, of the token table; by default 1, and 0.02 where it is tied"
    )
    head_std: float = at_least(0.0, 0.001, "normal, of the head")
    in_std: float | None = at_least(
        0.0, None, "normal, of all matrices of attention and MLP but their last; by default uniform"
    )
    up_scale: float = at_least(
        0.0, 1.0, "that the bound of the MLP's first matrix is multiplied by"
    )
    out_std: float = at_least(
        0.0, 0.0, "normal, of the last matrices of attention and MLP; 0: fresh layers add nothing"
    )
