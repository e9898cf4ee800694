"""Plan a run for some hardware: whether it fits, how long it takes, and what to change.

    looped-jax plan --config flt --mesh data=64,fsdp=8 --hardware h100 \\
        --vocab_size 151669

Needs neither data nor accelerators: memory, work and communication are counted, and with --target
v5e:4x4 or h100:8 the real train step is compiled, too, by that device's own compiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging

from looped_jax import cli, errors, files
from looped_jax.config.registry import TASKS
from looped_jax.config.settings import MeshConfig, Settings, parse_mesh
from looped_jax.data.tokenizer import BYTES, CHARACTERS, read_tokenizer
from looped_jax.errors import ConfigError
from looped_jax.planning import planner, targets
from looped_jax.planning.table import describe
from looped_jax.resolve import resolve
from looped_jax.runtime import hardware, sharding


def main(argv: Sequence[str] | None = None) -> None:
    run(cli.parse("plan", argv))


def run(args: argparse.Namespace) -> None:
    logging.set_verbosity(logging.ERROR)
    if not args.hardware and not args.target:
        cli.stop(
            f"--hardware is missing; name it: {', '.join(hardware.HARDWARE)}; or give a --target, "
            "as h100:8 or v5e:4x4, whose own compiler is then asked, too"
        )
    if args.hardware and args.target:
        cli.stop(f"--target={args.target} names its hardware; leave out --hardware")
    if args.efficiency is not None and not 0 < args.efficiency <= 1:
        cli.stop(f"--efficiency={args.efficiency} is no share; give one, as 0.45")
    with errors.printed():
        device = targets.device(args.target) if args.target else hardware.find(args.hardware)
        if args.target:
            targets.look_for_compilers(args.target)
        out = writable(args.out) if args.out else None
        settings = args.settings
        mesh = parse_mesh(args.mesh) if args.mesh else settings.mesh
        if args.target:
            mesh = sharding.filled(mesh, targets.size(args.target))
        _imitate_devices(mesh, platforms=None if args.target else "cpu")
        settings = dataclasses.replace(settings, mesh=mesh)
        config = resolve(settings, vocab_size=args.vocab_size or vocabulary(settings))
        plan = planner.make(
            config,
            device,
            efficiency=args.efficiency,
            target=targets.find(args.target) if args.target else None,
            log=_progress,
        )
        if out:
            files.write_json(out, plan.as_json(), indent=1)
    print(describe(plan))


def vocabulary(config: Settings) -> int:
    """Entries of the task's vocabulary, or of the configured tokenizer.

    Raises ConfigError if its file is not here, and DataError for text that its characters want.
    """
    path = config.data.tokenizer
    if config.model.vocab_size:
        return config.model.vocab_size
    if config.data.task != "text":
        return TASKS[config.data.task](config).vocab_size
    data = Path(config.data.path).expanduser()
    of_tokens = data.suffix == ".bin" or any((*data.glob("*.bin"), *data.glob("*/*.bin")))
    if of_tokens or path in (BYTES, CHARACTERS):
        return TASKS["text"](config).vocab_size
    if path is None:
        return config.data.tokenizer_vocab_size
    if not Path(path).is_file():
        raise ConfigError(
            f"data.tokenizer={path} is not here; give its number of entries instead, as "
            "--vocab_size=151669"
        )
    return read_tokenizer(Path(path), bos_token=config.data.bos_token).vocab_size


def writable(file: str) -> Path:
    """The path, known to be writable before work is spent on it. Raises ConfigError."""
    path = Path(file)
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out={file} cannot be written ({error.strerror}); name a file, as plan.json"
        ) from error
    return path


def _imitate_devices(mesh: MeshConfig, *, platforms: str | None) -> None:
    """As many CPU devices as the mesh has; must come before JAX looks for devices.

    `platforms`: those that JAX may look for, None for those that it was told already.
    """
    sizes = dataclasses.asdict(mesh)
    if -1 in sizes.values():
        axis = next(axis for axis, size in sizes.items() if size == -1)
        raise ConfigError(f"mesh.{axis}=-1 leaves open how many devices; as --mesh data=8,fsdp=8")
    if platforms:
        jax.config.update("jax_platforms", platforms)
    jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
