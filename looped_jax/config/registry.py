"""Named things that users can add to: loop rules, parts, objectives, optimizers, tasks and so on.

A file of the user's own registers one when it is imported, as a configuration file is:

    @LOOP_RULES.register("mine")
    class Mine(LoopRule): ...

From then on it is a choice of the setting, in help and errors, and in what iterates the registry.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T", bound=Any)


class Registry(Mapping[str, Any]):
    """What is registered of one `kind`, by name, in the order of registration.

    `one` is the kind with its article. `home` is the module that registers what comes with this
    package, and `others` are further ones that do; they are imported when somebody first looks, so
    that settings can be checked without importing the model before.
    """

    def __init__(self, kind: str, home: str, *others: str):
        self.kind, self._homes = kind, (home, *others)
        self.one = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
        self._found: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a class or function. Raises ValueError for a name that is taken.

        The same class again, as when a notebook's cell is run twice, takes the place of the first.
        """
        if self._homes[0] not in sys.modules:
            importlib.import_module(self._homes[0])  # so that its names come first

        def add(thing: T) -> T:
            known = self._found.get(name, thing)
            if (known.__module__, known.__qualname__) != (thing.__module__, thing.__qualname__):
                raise ValueError(f"there is {self.one} {name!r} already; choose another name")
            self._found[name] = thing
            return thing

        return add

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._all()))

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, Any]:
        for home in self._homes:
            importlib.import_module(home)
        return self._found


LOOP_RULES = Registry("loop rule", "looped_jax.model.loop_rules")
EMBEDDINGS = Registry("embedding", "looped_jax.model.embeddings")
PARTS = Registry("part", "looped_jax.model.parts")
WEIGHT_GROUPS = Registry(
    "weight group",
    "looped_jax.model.weight_groups",
    "looped_jax.model.parts",
    "looped_jax.model.loop_rules",
    "looped_jax.model.embeddings",
)
OBJECTIVES = Registry("objective", "looped_jax.model.objectives")
OPTIMIZERS = Registry("optimizer", "looped_jax.training.optimizers")
TASKS = Registry("task", "looped_jax.tasks")
PACKINGS = Registry("packing", "looped_jax.data.packing")
LOOP_DISTRIBUTIONS = Registry(
    "distribution of loop counts", "looped_jax.training.loop_distributions"
)
