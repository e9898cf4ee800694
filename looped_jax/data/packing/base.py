"""A packing: how the documents of row groups become rows of T + 1 tokens, without padding.

To try another, register it, here or in a file of your own: it is then a choice of `data.packing`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import grain
import numpy as np

from looped_jax.config.registry import PACKINGS
from looped_jax.config.setting_tree import plain
from looped_jax.config.settings import DataConfig
from looped_jax.data.worker_processes import in_workers
from looped_jax.errors import ConfigError, DataError


class Encoder(Protocol):
    """What makes tokens of documents; it can be sent to worker processes."""

    def encode_documents(self, documents: Sequence[Any], /) -> list[np.ndarray]:
        """Tokens of each, int32, behind a start token where there is one."""
        ...


class Packing(abc.ABC):
    """Base of all packings, made from `Settings` of its own, where it has some.

    A position is JSON. Its "group" is the number of the process's own row group being read, counted
    through all epochs. `files` are the row groups of each file, or of the corpus where it is
    shuffled as a whole.
    """

    Settings: ClassVar[type | None] = None
    name: str = ""  # what it is registered as
    # Whether processes share the row groups of each file, and not those of the whole corpus.
    shares_files: ClassVar[bool] = False
    # Whether every document has to begin with a start token.
    needs_starts: ClassVar[bool] = False

    def __init__(self, settings: Any = None):
        self.settings = settings

    @abc.abstractmethod
    def rows(
        self,
        documents: grain.MapDataset,
        encoder: Encoder,
        *,
        seq_len: int,
        workers: int,
        shuffle_seed: int | None = None,
    ) -> grain.IterDataset:
        """Endless rows int32 [T + 1] of `documents`, whose element i is the texts of row group i.

        They are read and tokenized ahead in `workers` processes (0: a thread), which changes no
        row. Raises DataError after an epoch without a document.
        """

    def share(self, files: Sequence[int], *, index: int, count: int) -> int:
        """How many row groups process `index` of `count` reads in an epoch."""
        shared = files if self.shares_files else [sum(files)]
        return sum(len(range(index, groups, count)) for groups in shared)

    def epochs(
        self, position: dict[str, Any], files: Sequence[int], *, index: int, count: int
    ) -> float:
        """How often process `index` of `count` has read its own row groups, in whole ones.

        1.25: once, and a quarter of them a second time.
        """
        return position["group"] / self.share(files, index=index, count=count)

    def remap_positions(
        self, positions: Sequence[dict[str, Any]], files: Sequence[int], *, index: int, count: int
    ) -> dict[str, Any]:
        """Where process `index` of `count` goes on after processes that stood at `positions`."""
        raise ConfigError(
            f"data.packing={self.name}: rows of {len(positions)} hosts cannot go on on {count}, "
            f"each has documents of its own at hand; start {len(positions)}"
        )

    def metrics(self, position: dict[str, Any]) -> dict[str, float]:
        """What is logged of every step, where its rows end at `position`."""
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """What two runs of the same rows share beside text and tokenizer, ready for JSON."""
        own = {} if self.settings is None else plain(self.settings)
        return {"packing": {"name": self.name, **own}}


def read_ahead(groups: grain.MapDataset, start: int, *, workers: int) -> grain.DatasetIterator:
    """Elements start, start + 1, … of `groups`, counted through all epochs, in order.

    They are made ahead in `workers` processes, or in a thread where there is none.
    """
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)  # one may be a large file
    elements = groups.repeat().slice(slice(start, None)).to_iter_dataset(ahead)
    if workers:
        elements = in_workers(elements, workers)
    return iter(elements)


def nothing_to_read(groups: int) -> DataError:
    """What is raised after an epoch of so many row groups without a document."""
    return DataError(
        f"data.path: all {groups} row groups that this process trains on are empty; "
        "add text or use fewer processes"
    )


def of(data: DataConfig) -> Packing:
    """The packing that settings choose."""
    kind = PACKINGS[data.packing]
    packing = kind(data.packings[data.packing]) if kind.Settings else kind()
    packing.name = data.packing
    return packing
