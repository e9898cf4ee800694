"""Where settings come from: a preset by name, a file, or a run; and values that are given as text.

`flt:tiny` is a loop rule under a preset, `huginn:tiny` a family of models. A Python file has
get_config(preset); a YAML file has settings by group, over those of a preset where one is named, as
`mine.yaml:tiny`. A run is its folder or the config.json in it; what is made from it is another run,
with a folder of its own.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import sys
import traceback
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from looped_jax.config import presets
from looped_jax.config.families import FAMILIES
from looped_jax.config.nearest import nearest
from looped_jax.config.registry import LOOP_RULES
from looped_jax.config.setting_tree import plain_type
from looped_jax.config.settings import RENAMED, all_settings
from looped_jax.errors import ConfigError, UserError

Values = dict[str, Any]  # settings by group, as Settings.from_dict takes and checks them


def read(source: str) -> Values:
    """The settings of `source`. Raises ConfigError."""
    name, _, preset = source.partition(":")
    path = Path(name).expanduser()
    if path.is_dir():
        if preset:
            raise ConfigError(f"--config={source}: a run has no presets; leave :{preset} out")
        path /= "config.json"
        if not path.is_file():
            raise ConfigError(f"--config={source}: {name} is no run folder, config.json is missing")
    if not path.suffix:
        presets.check(preset, name.lower())  # which imports no model, as the rules do
        return presets.make(_model(name), preset).to_dict()
    if path.suffix not in (".py", ".yaml", ".yml", ".json"):
        raise ConfigError(f"--config={source}: give a .py, .yaml or .json file, or as flt:tiny")
    if not path.is_file():
        raise ConfigError(f"--config: there is no file {path}; give one, or a preset, as flt:tiny")
    return _of_python(path, preset) if path.suffix == ".py" else _of_data(path, preset)


def put(values: Values, key: str, value: Any) -> None:
    """Set the setting of a dotted name."""
    *groups, name = key.split(".")
    for group in groups:
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {group}={values!r} is no group of settings; give one")
    values[name] = value


def parse(text: str, kind: Any) -> Any:
    """The value that `text` gives a setting of type `kind`; "None" is what it is by default.

    Raises ValueError.
    """
    plain = plain_type(kind)
    if text == "None" and isinstance(kind, types.UnionType):
        return None
    if plain is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if plain is not tuple:
        return plain(text)
    inner = typing.get_args(kind)[0]
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        found = text
    parts = tuple(found) if isinstance(found, tuple | list) else (found,)
    if all(type(part) is inner for part in parts):
        return parts
    if inner is str:  # one text, whatever else it could be read as
        return (text,)
    raise ValueError(text)


def _model(name: str) -> str:
    """The loop rule or family of models of that name, whatever its case."""
    known = {one.lower(): one for one in (*LOOP_RULES, *FAMILIES)}
    if name.lower() not in known:
        near = nearest(name.lower(), dict.fromkeys(known, "")) or list(known)
        raise ConfigError(
            f"--config={name} is no run, file, loop rule or family of models; nearest: {near[0]}"
        )
    return known[name.lower()]


def imported(path: Path) -> types.ModuleType:
    """A Python file as a module; it may import what lies beside it or its folder."""
    folder = path.resolve().parent
    sys.path += [str(f) for f in (folder.parent, folder) if str(f) not in sys.path]
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _of_python(path: Path, preset: str) -> Values:
    """What get_config of the file returns."""
    try:
        return imported(path).get_config(*([preset] if preset else [])).to_dict()
    except UserError:
        raise
    except Exception as error:  # a file of the user's own may raise anything
        where = f"{path}, line {line}" if (line := _line_of(error, path)) else f"{path}"
        told = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(f"{where}: {type(error).__name__}: {told}") from error


def _line_of(error: Exception, path: Path) -> int | None:
    """The line of the file that an error came from, or by way of."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((each.lineno for each in reversed(frames) if each.filename == str(path)), None)


def _of_data(path: Path, preset: str) -> Values:
    """The settings in a YAML or JSON file, over those of the preset or the defaults."""
    try:
        text = path.read_text("utf-8")
        given = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path} holds no settings by group; as model: {{loops: 4}}")
    if preset:
        presets.check(preset)
    values = presets.make("FLT", preset).to_dict() if preset else {}
    known = all_settings()
    for old, value in _leaves(given):
        key = RENAMED.get(old, old)
        if isinstance(value, str) and key in known:  # YAML takes 1e-3 for a text
            with contextlib.suppress(ValueError, KeyError):  # what is wrong is said of all later
                value = parse(value, known[key].kind)
        put(values, key, value)
    if path.name == "config.json":
        put(values, "train.run_dir", None)
    return values


def _leaves(values: Values, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        name = "on" if name is True else name  # as YAML reads `on:`, the switch of parts
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
