"""The command line of programs: `--config configs/file.py:preset` and overrides of its keys.

A wrong flag, key or value ends the program with one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from looped_jax.config.settings import plain_type, setting_types, unknown_key
from looped_jax.errors import ConfigError


def define_config() -> flags.FlagHolder:
    """`--config configs/file.py:preset` plus `--config.group.field=value` overrides."""
    return config_flags.DEFINE_config_file(
        "config", None, "configs/<file>.py, optionally :preset", lock_config=True
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Flags parser for `absl.app.run`: a bad flag ends the program with one line and code 2.

    Files under configs/ may import one another as `configs.<name>`, wherever the program starts.
    """
    for arg, value in zip(argv, [*argv[1:], ""], strict=True):
        if arg in ("--config", "-config") or arg.startswith(("--config=", "-config=")):
            path = Path((arg.split("=", 1)[1] if "=" in arg else value).split(":")[0])
            if not path.is_file():
                _stop(f"--config: there is no file {path}; give one, as configs/flt.py:tiny")
            sys.path += [str(path.resolve().parent.parent), str(path.resolve().parent)]
    try:
        rest = flags.FLAGS(list(argv))
        if flags.FLAGS.config is None:
            raise ConfigError("--config is missing; give one, as --config configs/flt.py:tiny")
        return rest
    except (flags.Error, AttributeError, TypeError, ValueError, KeyError, OSError) as error:
        _stop(_flag_message(argv, error))


def add_import(flags: argparse.ArgumentParser) -> None:
    """`--import my_rule`: modules that register what a run of one's own was made with."""
    flags.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="a module of your own that registers rules, parts or others, from the current folder",
    )  # fmt: skip


def import_own(modules: Sequence[str]) -> None:
    """Import them, from the current folder too. Raises ConfigError."""
    sys.path.append(str(Path.cwd()))
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"--import={module}: {error}; give a module's name") from error


def _stop(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2) from None


def _flag_message(argv: Sequence[str], error: Exception) -> str:
    """What is wrong with the first bad `--config.…` override, else the error's own first line."""
    if "Traceback" in str(error):  # the flag library quotes what a configuration file raises
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, ConfigError):
        return str(error)
    known = setting_types()
    groups = {key.rpartition(".")[0] for key in known}
    for arg in argv:
        key, _, value = arg.lstrip("-").partition("=")
        if not key.startswith("config."):
            continue
        key = key.removeprefix("config.")
        group, _, name = key.rpartition(".")
        if group not in groups:
            return unknown_key(group or name, groups, prefix="")
        if key not in known:
            of_group = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == group]
            return unknown_key(name, of_group, prefix=f"{group}.")
        if not _parses(value, known[key]):
            kind = plain_type(known[key]).__name__
            return f"{key}={value!r} is not of type {kind}; give a value that is"
    return str(error).strip().splitlines()[0]


def _parses(value: str, kind: Any) -> bool:
    plain = plain_type(kind)
    try:
        if plain is tuple:
            for part in value.strip("()").split(","):
                typing.get_args(kind)[0](part)
        else:
            plain(value)
    except ValueError:
        return False
    return True
