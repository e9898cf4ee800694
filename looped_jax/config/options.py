"""What settings are made of: a field with its meaning, and groups of what is registered."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar

from looped_jax.config.registry import (
    EMBEDDINGS,
    LOOP_DISTRIBUTIONS,
    LOOP_RULES,
    OBJECTIVES,
    OPTIMIZERS,
    PACKINGS,
    PARTS,
    TASKS,
    WEIGHT_GROUPS,
    Registry,
)
from looped_jax.errors import ConfigError


class Options(Mapping[str, Any]):
    """Settings of what is registered in `registry`, by name; hashable.

    A registered class that has settings names their dataclass as its attribute `Settings`.
    """

    registry: ClassVar[Registry]

    def __init__(self, settings: Mapping[str, Any] | None = None):
        self._settings = dict(settings or {})
        if unknown := [name for name in self._settings if name not in self.registry]:
            raise ConfigError(
                f"{unknown[0]} is no {self.registry.kind}; choose {either(list(self.registry))}, "
                f"or import {self.registry.one} of your own first"
            )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Settings of everything that has some, as they are by default."""
        kinds = {name: getattr(thing, "Settings", None) for name, thing in cls.registry.items()}
        return {name: kind() for name, kind in kinds.items() if kind is not None}

    def __getitem__(self, name: str) -> Any:
        return self._settings.get(name) or self.registry[name].Settings()

    def __iter__(self) -> Iterator[str]:
        return iter(self.defaults())

    def __len__(self) -> int:
        return len(self.defaults())

    def changed(self) -> dict[str, Any]:
        """Those that are not as by default."""
        return {n: self[n] for n, default in self.defaults().items() if self[n] != default}

    def __hash__(self) -> int:
        return hash(tuple(self.changed().items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)})"


class Parts(Options):
    """Settings of every part; see model/parts/base.py."""

    registry = PARTS

    def on(self) -> tuple[str, ...]:
        """Names of the parts that are on."""
        return tuple(name for name in self if self[name].on)


class Rules(Options):
    """Settings of loop rules that have some."""

    registry = LOOP_RULES


class Embeddings(Options):
    """Settings of embeddings that have some."""

    registry = EMBEDDINGS


class Objectives(Options):
    """Settings of objectives that have some."""

    registry = OBJECTIVES


class Optimizers(Options):
    """Settings of optimizers that have some of their own."""

    registry = OPTIMIZERS


class WeightGroups(Options):
    """How each group of weights is updated; see model/weight_groups.py."""

    registry = WEIGHT_GROUPS


class Tasks(Options):
    """Settings of tasks that have some of their own."""

    registry = TASKS


class Packings(Options):
    """Settings of packings that have some."""

    registry = PACKINGS


class LoopDistributions(Options):
    """Settings of distributions of loop counts that have some."""

    registry = LOOP_DISTRIBUTIONS


def setting(default: Any, meaning: str, **rule: Any) -> Any:
    """A field with its meaning, which --help prints; a rule says which values it may have."""
    return field(default=default, metadata={"meaning": meaning, **rule})


def on_disk(default: str | None, meaning: str, **rule: Any) -> Any:
    """A file or folder, which no address of another machine is."""
    return setting(default, meaning, on_disk=True, **rule)


def at_least(low: float, default: Any, meaning: str, *, high: float = math.inf) -> Any:
    return setting(default, meaning, low=low, high=high)


def share(default: float, meaning: str) -> Any:
    return at_least(0.0, default, meaning, high=1.0)


def one_of(choices: Collection[str], default: str, meaning: str) -> Any:
    return setting(default, meaning, choices=choices)


def either(options: Sequence[Any]) -> str:
    words = [str(o) for o in options]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
