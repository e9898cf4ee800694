"""Groups of settings, whatever settings they have: read by name, built from values, written down.

A group is a frozen dataclass whose fields are settings or groups, or one of config/options.py,
whose fields are what is registered. Settings are named by a path of dots, as model.norm.eps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING
from typing import Any, NamedTuple

from ml_collections import config_dict

from looped_jax.config.options import Options, either
from looped_jax.config.registry import Registry
from looped_jax.errors import ConfigError
from looped_jax.files import check_on_disk


class Setting(NamedTuple):
    """One setting, by itself."""

    kind: Any  # its type
    default: Any
    meaning: str
    choices: Collection[str] | None


_type_hints = functools.cache(typing.get_type_hints)  # which compiles every one


def fields(kind: Any) -> dict[str, tuple[Any, Any, Mapping[str, Any]]]:
    """Type, default and metadata of every field of a group, by name."""
    if issubclass(kind, Options):
        return {name: (type(own), own, {}) for name, own in kind.defaults().items()}
    hints = _type_hints(kind)
    found: dict[str, tuple[Any, Any, Mapping[str, Any]]] = {}
    for f in dataclasses.fields(kind):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        found[f.name] = hints[f.name], default, f.metadata
    return found


def is_group(kind: Any) -> bool:
    """Whether a type is a group of settings, not a setting."""
    return isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, Options))


def settings_of(kind: Any, prefix: str = "", *, registered: bool = True) -> dict[str, Setting]:
    """Every setting of a group by its dotted name; without `registered`, none of what is."""
    found: dict[str, Setting] = {}
    for name, (inner, default, rule) in fields(kind).items():
        if not is_group(inner):
            meaning, choices = rule.get("meaning", ""), rule.get("choices")
            found[f"{prefix}{name}"] = Setting(inner, default, meaning, choices)
        elif registered or not issubclass(inner, Options):
            found |= settings_of(inner, f"{prefix}{name}.", registered=registered)
    return found


def registered_in(kind: Any, prefix: str = "") -> dict[str, type[Options]]:
    """The groups within a group that hold settings of what is registered, by dotted name."""
    found: dict[str, type[Options]] = {}
    for name, (inner, _, _) in fields(kind).items():
        if is_group(inner):
            key = f"{prefix}{name}"
            own = issubclass(inner, Options)
            found |= {key: inner} if own else registered_in(inner, f"{key}.")
    return found


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(dotted name, value, metadata) of every setting of a group that has values."""
    for name, (inner, _, metadata) in fields(type(settings)).items():
        value = settings[name] if isinstance(settings, Options) else getattr(settings, name)
        if is_group(inner):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, metadata


def config_dict_of(kind: Any) -> config_dict.ConfigDict:
    """The defaults of a group as a type-checked ConfigDict."""
    config = config_dict.ConfigDict()
    for name, (inner, default, _) in fields(kind).items():
        if is_group(inner):
            config[name] = config_dict_of(inner)
        elif default is None:
            config[name] = config_dict.placeholder(plain_type(inner))
        else:
            config[name] = default
    return config


def built(
    kind: Any,
    values: Any,
    prefix: str = "",
    *,
    renamed: Mapping[str, str],
    unknown: Callable[[str], str],
) -> Any:
    """A group from nested values, a ConfigDict's or plain ones. Raises ConfigError.

    `renamed`: dotted names by those that they had before; `unknown`: the message for a name that
    no setting has.
    """
    if not isinstance(values, Mapping | config_dict.ConfigDict):
        raise ConfigError(f"{prefix.rstrip('.')}={values!r} is no group of settings; give one")
    known, given = fields(kind), dict(values)
    for name in list(given):
        if (new := renamed.get(f"{prefix}{name}")) and new.rpartition(".")[2] in known:
            given[new.rpartition(".")[2]] = given.pop(name)
        elif name not in known:
            raise ConfigError(unknown(f"{prefix}{name}"))
    own = {}
    for name, (inner, _, rule) in known.items():
        if is_group(inner):
            below = given.get(name, {})
            own[name] = built(inner, below, f"{prefix}{name}.", renamed=renamed, unknown=unknown)
        elif name in given:
            value = _typed(f"{prefix}{name}", given[name], inner)
            own[name] = None if value == rule.get("none") else value
    return kind(own) if issubclass(kind, Options) else kind(**own)


def check_values(settings: Any) -> None:
    """That every setting has a value that its own rule allows. Raises ConfigError."""
    for key, value, rule in leaves(settings):
        if value is None:
            continue
        if rule.get("on_disk"):
            check_on_disk(value, key)
        if "choices" in rule and value not in rule["choices"]:
            own = rule["choices"]
            hint = f"; import {own.one} of your own first" if isinstance(own, Registry) else ""
            raise ConfigError(f"{key}={value!r} is unknown; choose {either(list(own))}{hint}")
        if "low" in rule and not rule["low"] <= value <= rule["high"]:
            high = "or more" if rule["high"] == math.inf else f"to {rule['high']}"
            raise ConfigError(f"{key}={value} is out of range; give {rule['low']} {high}")


def plain(value: Any) -> Any:
    """Settings, and whatever holds some, as plain values for JSON.

    What is registered and is as by default is left out: who does not have it needs not know.
    """
    if isinstance(value, Options):
        return {name: plain(own) for name, own in value.changed().items()}
    if dataclasses.is_dataclass(value):
        own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {
            n: plain(one) for n, one in own.items() if not isinstance(one, Options) or plain(one)
        }
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value


def plain_type(kind: Any) -> type:
    """int from `int | None`, tuple from `tuple[int, ...]`, and so on."""
    if isinstance(kind, types.UnionType):
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
    return typing.get_origin(kind) or kind


def _typed(key: str, value: Any, kind: Any) -> Any:
    plain = plain_type(kind)
    optional = isinstance(kind, types.UnionType)
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if plain is tuple and isinstance(value, list):
        value = tuple(value)
    if (value is None and optional) or (
        isinstance(value, plain) and not (plain is int and isinstance(value, bool))
    ):
        return value
    raise ConfigError(f"{key}={value!r} is not of type {plain.__name__}; give a value that is")
