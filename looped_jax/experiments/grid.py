"""A grid: rows of settings, each trained with several seeds. What a sweep runs.

A grid file is YAML, or Python with get_grid() that returns the same:

    config: flt:tiny                      # what all runs start from, as --config takes it
    settings: {train.steps: 200}          # and have in common
    rows:
      - settings: {model.variant: [FLT, LT], model.loops: [4, 12]}   # lists: every combination
      - label: one loop, as many FLOPs
        settings: {model.loops: 1}
        equal: flops                      # steps so that it costs what the reference row costs
    seeds: [0, 1, 2]
    reference: LT K=12                    # the first row by default
    imports: [my_rules]                   # modules or .py files that register what they name
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from looped_jax import cli
from looped_jax.config import sources
from looped_jax.config.nearest import nearest
from looped_jax.config.registry import TASKS
from looped_jax.config.resolved import Config, micro_batches
from looped_jax.config.settings import (
    RENAMED,
    OptimConfig,
    Settings,
    TrainSettings,
    all_settings,
    unknown_key,
)
from looped_jax.errors import ConfigError, UserError
from looped_jax.model import flops
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training.loop_sampler import LoopSampler

KEYS = ("config", "settings", "rows", "seeds", "reference", "imports")
ROW_KEYS = ("label", "settings", "equal")
EQUAL = ("steps", "flops", "seconds")


@dataclass(frozen=True)
class Row:
    """Settings, by dotted name, that are trained once per seed.

    equal: "steps" as the settings have them, and with them tokens; or as many steps as cost what
    the reference row costs, in "flops" or in "seconds"
    """

    label: str
    settings: Mapping[str, Any]
    equal: str = "steps"


@dataclass(frozen=True)
class Run:
    """One training run of a row."""

    row: Row
    seed: int
    settings: Settings

    @property
    def folder(self) -> Path:
        return Path(self.settings.train.run_dir or "")

    @functools.cached_property
    def config(self) -> Config:
        """As training will resolve it. Raises ConfigError or DataError."""
        rows = dataclasses.replace(self.settings, train=TrainSettings(), optim=OptimConfig())
        return resolve(self.settings, vocab_size=_vocab_size(rows))

    @property
    def flops(self) -> float:
        """Of all its steps, forward and backward, every loop counted."""
        config, train = self.config, self.config.train
        if not train.loop_sampling.on:
            return flops.count(config.model).flops * train.tokens_per_step * train.steps
        devices = sharding.batch_devices(sharding.make_mesh(config.mesh))
        return LoopSampler(config).flops(micro_batches(config, devices=devices))

    @property
    def name(self) -> str:
        return f"{self.row.label} seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """The rows of an experiment and its seeds; `base` is what all runs start from.

    imports: modules and .py files that have to be imported before settings are read
    """

    base: Mapping[str, Any]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    reference: str
    imports: tuple[str, ...] = ()

    @staticmethod
    def from_dict(values: Any, *, name: str = "grid") -> Grid:
        """A grid from what a file holds. Raises ConfigError, which begins with `name`."""
        _check_keys(values, KEYS, name, required=("config", "rows", "seeds"))
        imports = values.get("imports", [])
        if not _is_list_of(imports, str):
            raise ConfigError(f"{name}: imports={imports!r} is no list of modules; as [my_rules]")
        cli.import_own(imports, f"{name}: imports")
        base = sources.read(str(values["config"]))
        sources.put(base, "train.run_dir", None)
        for key, value in _settings(values, name).items():
            sources.put(base, RENAMED.get(key, key), value)
        if not isinstance(values["rows"], list) or not values["rows"]:
            raise ConfigError(
                f"{name}: rows={values['rows']!r} is no list of rows; give at least one"
            )
        rows = tuple(
            itertools.chain.from_iterable(_rows(row, base, name) for row in values["rows"])
        )
        labels = [row.label for row in rows]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ConfigError(f"{name}: two rows are {twice[0]!r}; give one another label")
        seeds = values["seeds"]
        if not _is_list_of(seeds, int) or not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(f"{name}: seeds={seeds!r} are no different numbers; as [0, 1, 2]")
        reference = values.get("reference", labels[0])
        if reference not in labels:
            near = nearest(str(reference), dict.fromkeys(labels, "")) or labels
            raise ConfigError(f"{name}: reference={reference!r} is no row; nearest: {near[0]!r}")
        source = str(values["config"]).partition(":")[0]
        files = [source] if source.endswith(".py") else []  # it may register, too
        return Grid(base, rows, tuple(seeds), reference, (*imports, *files))

    @staticmethod
    def read(path: Path) -> Grid:
        """The grid of a file. Raises ConfigError."""
        if not path.is_file():
            raise ConfigError(f"there is no grid {path}; give a .yaml or .py file")
        if path.suffix not in (".py", ".yaml", ".yml"):
            raise ConfigError(f"{path} is no grid; give a .yaml or .py file")
        try:
            python = path.suffix == ".py"
            values = (
                sources.imported(path).get_grid() if python else yaml.safe_load(path.read_text())
            )
        except UserError:
            raise
        except Exception as error:  # a file of the user's own may raise anything
            told = " ".join(str(error).split())
            raise ConfigError(f"{path}: {type(error).__name__}: {told}") from error
        grid = Grid.from_dict(values, name=str(path))
        return dataclasses.replace(grid, imports=(*grid.imports, *([str(path)] * python)))

    def runs(self, out: Path, steps: Mapping[str, int] | None = None) -> list[Run]:
        """Every run, seeds of a row one after another, each in a folder of its own under `out`.

        `steps` of rows by label take the place of the settings'. Raises ConfigError.
        """
        found = []
        for row in self.rows:
            for seed in self.seeds:
                values: dict[str, Any] = copy.deepcopy(dict(self.base))
                for key, value in row.settings.items():
                    sources.put(values, key, value)
                sources.put(values, "train.seed", seed)
                sources.put(values, "train.run_dir", str(out / f"{slug(row.label)}_seed{seed}"))
                if steps and row.label in steps:
                    sources.put(values, "train.steps", steps[row.label])
                try:
                    found.append(Run(row, seed, Settings.from_dict(values)))
                except ConfigError as error:
                    raise ConfigError(f"{row.label}: {error}") from error
        folders = [run.folder for run in found]
        if len(set(folders)) < len(folders):
            twice = next(run for run in found if folders.count(run.folder) > 1)
            raise ConfigError(
                f"{twice.row.label}: another row's folder is {twice.folder}, too; rename one"
            )
        return found

    def equal_flops(self, out: Path) -> dict[str, int]:
        """Steps by label of the rows that take as many FLOPs as the reference row."""
        runs = {run.row.label: run for run in self.runs(out) if run.seed == self.seeds[0]}
        budget = runs[self.reference].flops
        return {
            label: max(1, round(budget / run.flops * run.config.train.steps))
            for label, run in runs.items()
            if run.row.equal == "flops"
        }


def slug(label: str) -> str:
    """A label as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", label).strip("_")


def _rows(values: Any, base: Mapping[str, Any], name: str) -> Iterable[Row]:
    """The rows of one entry: every combination of the settings that are lists."""
    _check_keys(values, ROW_KEYS, f"{name}: rows", required=())
    equal = values.get("equal", "steps")
    if equal not in EQUAL:
        raise ConfigError(f"{name}: equal={equal!r}; choose {', '.join(EQUAL)}")
    given = {RENAMED.get(key, key): value for key, value in _settings(values, name).items()}
    several = {key: value for key, value in given.items() if isinstance(value, list)}
    if "label" in values and any(len(options) > 1 for options in several.values()):
        raise ConfigError(
            f"{name}: the row {values['label']!r} has lists of settings, which are many rows; "
            "leave out its label"
        )
    for combination in itertools.product(*several.values()):
        chosen = given | dict(zip(several, combination, strict=True))
        label = values.get("label") or _label(chosen, base, equal)
        yield Row(str(label), chosen, equal)


def _label(settings: Mapping[str, Any], base: Mapping[str, Any], equal: str) -> str:
    """Rule and loops, then what else the row sets: `LT K=12, optim.matrix_learning_rate=0.01`."""
    model = base.get("model", {})
    variant = settings.get("model.variant", model.get("variant", "FLT"))
    loops = settings.get("model.loops", model.get("loops", 12))
    others = [
        f"{key}={value}"
        for key, value in settings.items()
        if key not in ("model.variant", "model.loops")
    ]
    others += [] if equal == "steps" else [f"equal {equal if equal == 'seconds' else 'FLOPs'}"]
    return ", ".join([f"{variant} K={loops}", *others])


def _settings(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    given = values.get("settings", {})
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}: settings={given!r} are none by name; as {{model.loops: 4}}")
    known = all_settings()
    for key in given:
        if RENAMED.get(key, key) not in known:
            raise ConfigError(f"{name}: {unknown_key(str(key))}")
    return dict(given)


def _check_keys(values: Any, known: Sequence[str], name: str, required: Sequence[str]) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} holds {values!r}, not names and values; see docs/sweep.md")
    for key in values:
        if key not in known:
            near = nearest(str(key), dict.fromkeys(known, "")) or known
            raise ConfigError(f"{name}: {key} is unknown; nearest: {', '.join(near)}")
    if missing := [key for key in required if key not in values]:
        raise ConfigError(f"{name}: {missing[0]} is missing; see docs/sweep.md")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is kind for item in value)


@functools.cache
def _vocab_size(settings: Settings) -> int:
    return TASKS[settings.data.task](settings).vocab_size
