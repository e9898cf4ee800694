"""Named things that users can add to: loop rules, parts, objectives.

A file of the user's own registers one when it is imported, as a configuration file is:

    @LOOP_RULES.register("mine")
    class Mine(LoopRule): ...

From then on it is a choice of the setting, in help and errors, and in what iterates the registry.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, Any]):
    """What is registered of one `kind`, by name, in the order of registration.

    `home` is the module that registers what comes with this package; it is imported when somebody
    first looks, so that settings can be checked without importing the model before.
    """

    def __init__(self, kind: str, home: str):
        self.kind, self._home = kind, home
        self._found: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a class or function. Raises ValueError for a name that is taken."""

        def add(thing: T) -> T:
            if name in self._found:
                raise ValueError(f"there is a {self.kind} {name!r} already; choose another name")
            self._found[name] = thing
            return thing

        return add

    def __getitem__(self, name: str) -> Any:
        importlib.import_module(self._home)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        importlib.import_module(self._home)
        return iter(tuple(self._found))

    def __len__(self) -> int:
        importlib.import_module(self._home)
        return len(self._found)


LOOP_RULES = Registry("loop rule", "looped_jax.model.loop_rules")
PARTS = Registry("part", "looped_jax.model.parts")
OBJECTIVES = Registry("objective", "looped_jax.model.objectives")
