"""The command line: `looped-jax PROGRAM`, or `python -m looped_jax.PROGRAM`, and all flags.

Flags are declared here, not beside what they do, so that a wrong one is answered before a program
and JAX with it are imported. Exit codes: 0; 1 for what a user can put right, found while a program
runs; 2 for a wrong command line; both are one line on standard error. 75 (EX_TEMPFAIL) for training
that a signal stopped, and that the same command goes on with.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import flags as absl_flags

from looped_jax import errors, files
from looped_jax.config import settings, sources
from looped_jax.config.nearest import nearest
from looped_jax.config.options import either
from looped_jax.config.setting_tree import Setting, plain_type
from looped_jax.config.settings import Settings, all_settings
from looped_jax.errors import ConfigError

# ---- the flags of each program -------------------------------------------------------------------


def _train(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "text", nargs="?", metavar="TEXT",
        help="what to train on, as data.path; --config is then flt:tiny by default",
    )  # fmt: skip
    flags.add_argument("--profile_steps", metavar="FIRST:LAST", help="trace these, as 10:13")


def _evaluate(flags: argparse.ArgumentParser) -> None:
    _add_checkpoint(flags)
    modes = ("bpb", "sample", "core", "ppl", "validation")
    flags.add_argument(
        "--modes", type=_some_of(modes),
        help="any of bpb,sample,core,ppl of a text model; validation of any other [all]",
    )  # fmt: skip
    flags.add_argument(
        "--all_steps", action="store_true", help="every checkpoint kept, with a curve; not --step"
    )
    flags.add_argument("--loops", type=counts, help="loop counts, as 1,3,6; those of training")
    flags.add_argument(
        "--data", type=on_disk, help="text for bpb, as data.path; the run's own by default"
    )
    flags.add_argument(
        "--eval_tokens", type=at_least(1),
        help="targets; by default 1,048,576 for bpb, the run's train.eval_tokens for validation",
    )  # fmt: skip
    flags.add_argument(
        "--wikitext", type=on_disk,
        help="WikiText-2 test split, text or parquet; downloaded by default",
    )  # fmt: skip
    flags.add_argument(
        "--bundle", type=on_disk, help="folder of the CORE bundle; downloaded by default"
    )
    flags.add_argument("--bundle_url", help="where it is downloaded from")
    flags.add_argument("--max_per_task", type=at_least(1), help="examples per task; by default all")
    flags.add_argument(
        "--max_len", type=at_least(2),
        help="tokens of a prompt of core or ppl, the last ones; 10 model.seq_len by default",
    )  # fmt: skip
    flags.add_argument("--batch_size", type=at_least(1), default=32, help="rows per device")
    flags.add_argument("--mesh", help="devices by axis, as data=4,tensor=2; all as data by default")
    flags.add_argument("--out", type=on_disk, help="folder for results; inside the run by default")


def _generate(flags: argparse.ArgumentParser) -> None:
    _add_checkpoint(flags)
    flags.add_argument("--prompt", action="append", help="repeat for several; none: from nothing")
    flags.add_argument(
        "--interactive", action="store_true",
        help="a text for every line of input; the line loops=8 sets the loop count",
    )  # fmt: skip
    flags.add_argument("--samples", type=at_least(1), default=1, help="texts per prompt")
    flags.add_argument("--tokens", type=at_least(1), default=64, help="new tokens at most")
    flags.add_argument("--loops", type=at_least(1), help="loop count; the trained one by default")
    flags.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    flags.add_argument("--top_k", type=at_least(0), default=0, help="likeliest tokens; 0 is all")
    flags.add_argument("--top_p", type=float, default=1.0, help="share of probability drawn from")
    flags.add_argument("--seed", type=int, default=0, help="of what is drawn")
    flags.add_argument(
        "--cache", choices=("exact", "last"), default="exact",
        help="a slot per loop and layer; or the last loop's alone, as the PyTorch reference",
    )  # fmt: skip
    flags.add_argument("--mesh", help="devices by axis, as data=2,tensor=4; one device by default")


def _diagnose(flags: argparse.ArgumentParser) -> None:
    _add_checkpoint(flags)
    flags.add_argument("--loops", type=at_least(1), help="largest loop count; by default eval's")
    flags.add_argument("--text", help="text whose attention is drawn; validation's by default")
    flags.add_argument(
        "--data", type=on_disk, help="text to measure, as data.path; the run's own by default"
    )
    flags.add_argument("--tokens", type=at_least(1), default=32_768, help="validation tokens")
    flags.add_argument(
        "--pictures", type=at_least(0), default=64,
        help="in each of attention_heatmaps and weight_distributions, at most; 0 = none",
    )  # fmt: skip
    flags.add_argument("--batch_size", type=at_least(1), default=8, help="rows at once")
    flags.add_argument("--mesh", help="devices by axis, as data=4,tensor=2; one device by default")
    flags.add_argument("--out", type=on_disk, help="folder for the page; inside the run by default")


def _compare(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("runs", nargs="+", type=path, metavar="RUN", help="folder of a run")
    flags.add_argument("--out", type=path, required=True, help="folder for the page")
    _add_table(flags)
    _add_import(flags)


def _sweep(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("grid", type=path, metavar="GRID", help="a .yaml or .py file: docs/sweep.md")
    flags.add_argument("--out", type=path, help="folder of all runs; runs/ and the grid's name")
    flags.add_argument(
        "--workers", type=at_least(1), help="runs at a time; by default one per GPU or CPU core"
    )
    flags.add_argument("--dry_run", action="store_true", help="list the runs and what they take")
    _add_table(flags)


def _add_table(flags: argparse.ArgumentParser) -> None:
    """What the table of several runs shows."""
    flags.add_argument(
        "--loops", type=counts, default=(), help="also show scores at these loop counts, as 1,4,8"
    )
    flags.add_argument(
        "--equal", choices=("tokens", "flops", "seconds"),
        help="read runs off where they have spent as much; as they ended by default",
    )  # fmt: skip
    flags.add_argument(
        "--metric", help="column to rank rows by, as bpb or 'bpb at 4'; validation's by default"
    )
    flags.add_argument("--reference", help="row to hold the others against; the best by default")


def _plan(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--hardware", help="what it would run on, as h100; none lists all known")
    flags.add_argument(
        "--target", help="devices whose own compiler is asked too, as h100:8, a100:2x8 or v5e:4x4"
    )
    flags.add_argument("--mesh", help="devices by axis, as data=64,fsdp=8; config.mesh by default")
    flags.add_argument(
        "--vocab_size", type=at_least(2), help="tokenizer entries, where its file is missing"
    )
    flags.add_argument(
        "--efficiency",
        type=float,
        help="share of the peak that products reach; as compiled with --target, else 0.45",
    )
    flags.add_argument("--out", type=on_disk, help="also write the plan as JSON to this file")


def _lr_find(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--loops", type=counts, help="loop counts, as 1,4,12; by default config's")
    flags.add_argument("--low", type=float, default=1e-3, help="first multiplier of all rates")
    flags.add_argument("--high", type=float, default=30.0, help="last multiplier")
    flags.add_argument("--steps", type=at_least(16), default=100, help="optimizer steps of a ramp")
    flags.add_argument(
        "--from_run", action="store_true", help="start from train.run_dir's newest checkpoint"
    )
    flags.add_argument(
        "--out", type=path, default=Path("runs/lr_find"), help="folder for figure and numbers"
    )


def _download(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "name", nargs="?", metavar="NAME",
        help="fineweb-edu, shakespeare, tinystories, openwebtext, fineweb10b-gpt2, wikitext-2 or "
        "core",
    )  # fmt: skip
    flags.add_argument("--shards", type=int, help="files in all, the validation one included")
    flags.add_argument(
        "--documents", type=at_least(1),
        help="the first so many alone, of tinystories, openwebtext or fineweb-edu",
    )  # fmt: skip
    flags.add_argument("--out", type=path, help="their folder; data/NAME by default")
    flags.add_argument("--dataset", help="hub repository of fineweb-edu's shards")
    flags.add_argument("--bundle_url", help="where core is downloaded from")
    flags.add_argument("--tokenizer", help="hub repository, as Qwen/Qwen3-4B; or gpt2")
    flags.add_argument("--tokenizer_out", type=path, help="data/<name>/tokenizer.json by default")
    flags.add_argument("--endpoint", help="of the hub; $HF_ENDPOINT or huggingface.co by default")
    flags.add_argument("--parallel", type=at_least(1), default=8, help="downloads at once")
    flags.add_argument("--retries", type=at_least(0), default=5, help="of a download that breaks")
    flags.add_argument("--timeout", type=float, default=30.0, help="seconds without a byte")
    flags.add_argument(
        "--start_after", type=at_least(1), help="training shards before what follows -- starts"
    )


def _convert(flags: argparse.ArgumentParser) -> None:
    commands = flags.add_subparsers(dest="command", required=True, metavar="DIRECTION")
    for name, source in (("from-reference", "a reference"), ("from-nanochat", "a nanochat")):
        there = commands.add_parser(name, help=f"{source} checkpoint into a run folder of ours")
        there.add_argument("run_dir", type=path)
        there.add_argument("out", type=path)
        there.add_argument("--step", type=int, help="the last by default")
        _add_converted(there)
    hub = commands.add_parser("from-gpt2", help="a GPT-2 of the hub into a run folder of ours")
    hub.add_argument("source", help="a folder with config.json and model.safetensors, or its name")
    hub.add_argument("out", type=path)
    hub.add_argument("--endpoint", help="of the hub; $HF_ENDPOINT or huggingface.co by default")
    _add_converted(hub)
    nanogpt = commands.add_parser("from-nanogpt", help="a nanoGPT checkpoint into a run folder")
    nanogpt.add_argument("file", type=path, help="ckpt.pt")
    nanogpt.add_argument("out", type=path)
    _add_converted(nanogpt)
    for name, layout in (
        ("to-reference", "the reference's layout"),
        ("to-nanochat", "nanochat's"),
        ("to-gpt2", "a folder for transformers"),
    ):
        back = commands.add_parser(name, help=f"a run of ours into {layout}")
        back.add_argument("run_dir", type=path)
        back.add_argument("out", type=path)
        back.add_argument("--step", type=int, help="the last by default")
    words = commands.add_parser("tokenizer", help="tokenizer.pkl into tokenizer.json, or back")
    words.add_argument("file", type=path)
    words.add_argument("out", type=path)


def _add_converted(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--tokenizer", type=path, help="tokenizer.json or nanochat's tokenizer.pkl")
    flags.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="what the converted model computes in",
    )  # fmt: skip


def _add_checkpoint(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--checkpoint", type=on_disk, required=True, metavar="RUN", help="folder of a run"
    )
    flags.add_argument("--step", type=int, help="checkpoint of this step; the newest by default")
    _add_import(flags)


def _add_import(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="a module of your own that registers rules, parts or others, from the current folder",
    )  # fmt: skip


class Program(NamedTuple):
    """A module that has run(args), what it takes, and whether it takes settings too."""

    module: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    takes_settings: bool = False


PROGRAMS = {
    "train": Program("looped_jax.train", _train, takes_settings=True),
    "evaluate": Program("looped_jax.evaluate", _evaluate),
    "generate": Program("looped_jax.generate", _generate),
    "diagnose": Program("looped_jax.diagnose", _diagnose),
    "compare": Program("looped_jax.compare", _compare),
    "sweep": Program("looped_jax.sweep", _sweep),
    "plan": Program("looped_jax.plan", _plan, takes_settings=True),
    "lr-find": Program("looped_jax.lr_find", _lr_find, takes_settings=True),
    "download": Program("looped_jax.data.download", _download),
    "convert": Program("torch_ref.convert", _convert),
}


# ---- from arguments to a program -----------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """`looped-jax PROGRAM ...`; without a program, the list of them."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return
    name = name.replace("_", "-")
    if name not in PROGRAMS:
        near = nearest(name, dict.fromkeys(PROGRAMS, "")) or list(PROGRAMS)
        stop(f"{name} is no program; nearest: {', '.join(near)}")
    args = parse(name, rest)
    if name == "convert" and importlib.util.find_spec("torch") is None:
        sys.stderr.write("error: convert needs PyTorch; pip install 'looped_jax[torch]'\n")
        raise SystemExit(1)
    importlib.import_module(PROGRAMS[name].module).run(args)


def overview() -> str:
    """All programs with the first line of what they say of themselves, and the exit codes."""
    lines = [f"  {name:10}{_docstring(name).splitlines()[0]}" for name in PROGRAMS]
    return "\n".join(
        [
            "usage: looped-jax PROGRAM [flags]      looped-jax PROGRAM --help lists its flags",
            "",
            *lines,
            "",
            "exit codes: 0 done; 1 something to put right, which one line names; 2 wrong flags; "
            "75 stopped by a signal",
        ]
    )


def parse(name: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a program from `argv`, by default the process's own; see `parse_flags`."""
    program = PROGRAMS[name]
    given = sys.argv[1:] if argv is None else argv
    made = {"prog": f"looped-jax {name}", "description": _docstring(name)}
    read = parse_settings if program.takes_settings else parse_flags
    own, command = list(given), []
    if name == "download" and "--" in own:  # what follows is another command, with its own flags
        own, command = own[: own.index("--")], own[own.index("--") + 1 :]
    args = read(program.add_flags, own, **made)
    return argparse.Namespace(**vars(args), command=command) if name == "download" else args


def parse_flags(
    add_flags: Callable[[argparse.ArgumentParser], None], argv: Sequence[str], **made: Any
) -> argparse.Namespace:
    """Flags alone; modules given as --import are imported. A wrong one ends the program."""
    flags = Parser(**made)
    add_flags(flags)
    args = flags.parse_args(argv)
    with errors.printed(code=2):
        import_own(getattr(args, "imports", []))
    absl_flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags
    return args


def parse_settings(
    add_flags: Callable[[argparse.ArgumentParser], None], argv: Sequence[str], **made: Any
) -> argparse.Namespace:
    """Flags, and as `settings` those of --config with the --config.group.name that change some.

    A wrong one ends the program. What is wrong with a name that comes with this package is found
    before anything is imported that registers others.
    """

    def parser(known: Mapping[str, Setting], shown: Mapping[str, Any]) -> Parser:
        usage = "%(prog)s [--config SOURCE] [--config.GROUP.NAME VALUE ...] [other arguments]"
        flags = Parser(usage=usage, **made)
        add_flags(flags)
        flags.add_argument(
            "--config", metavar="SOURCE",
            help="where settings come from: a loop rule or model and a preset, as flt:tiny or "
            "huginn:tiny; a .py or .yaml file, also as FILE:tiny; a run's folder or config.json, "
            "for a new run like it",
        )  # fmt: skip
        _add_import(flags)
        _add_settings(flags, known, shown)
        return flags

    bare = [arg for arg in argv if arg not in ("-h", "--help")]
    known = all_settings(registered=False)
    quick = parser(known, {})
    quick.later = tuple(f"--config.{group}." for group in settings.registered_groups())
    first, _ = quick.parse_known_args(bare)
    text = getattr(first, "text", None)
    source = first.config or (text and "flt:tiny")
    if source is None and bare == list(argv):
        stop("--config is missing; give one, as --config flt:tiny")
    with errors.printed(code=2):
        import_own(first.imports)
        values = sources.read(source) if source else {}
        if text is not None:
            if getattr(first, "config.data.path", None):
                raise ConfigError(
                    f"{text} and --config.data.path={getattr(first, 'config.data.path')} are both "
                    "to be trained on; give one"
                )
            sources.put(values, "data.path", text)
        shown = Settings.from_dict(values).leaves()
        args = parser(all_settings(), shown).parse_args(argv)
        for key, value in vars(args).items():
            if key.startswith("config."):
                sources.put(values, key.removeprefix("config."), value)
        args.settings = Settings.from_dict(values)
    absl_flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags
    return args


def stop(message: str) -> NoReturn:
    """End the program: its command line is wrong, and how it should be."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2) from None


def command() -> list[str]:
    """How this process was started, for messages that say how to go on."""
    start = Path(sys.argv[0])
    module = [_as_typed(sys.executable), "-m", ".".join(("looped_jax", start.stem))]
    return [*(module if start.suffix == ".py" else [_as_typed(sys.argv[0])]), *sys.argv[1:]]


def command_of(program: str, *flags: str) -> list[str]:
    """What runs `program` with `flags`, started as this process was."""
    if Path(sys.argv[0]).suffix == ".py":
        return [_as_typed(sys.executable), "-m", PROGRAMS[program].module, *flags]
    return [_as_typed(sys.argv[0]), program, *flags]


def _as_typed(program: str) -> str:
    """The shortest that a shell in this folder finds `program` by: name, relative or full path."""
    path = Path(os.path.abspath(program))  # a venv's python is a link, and the link is what counts
    if (found := shutil.which(path.name)) and Path(os.path.abspath(found)) == path:
        return path.name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _docstring(name: str) -> str:
    """What a program says of itself, without importing it."""
    spec = importlib.util.find_spec(PROGRAMS[name].module)
    assert spec and spec.origin
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or ""


def import_own(modules: Iterable[str], given_as: str = "--import") -> None:
    """Import modules, or .py files, that register techniques; also from the current folder."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    for module in modules:
        try:
            if module.endswith(".py"):
                sources.imported(Path(module))
            else:
                importlib.import_module(module)
        except ConfigError:
            raise
        except Exception as error:  # a module of the user's own may raise anything
            raise ConfigError(
                f"{given_as}={module}: {error}; give a module's name or a .py file"
            ) from error


# ---- parsing -------------------------------------------------------------------------------------


class _Help(argparse.RawDescriptionHelpFormatter):
    """Examples stay as they are written, and a flag that has a default shows it."""

    def __init__(self, prog: str):
        width = shutil.get_terminal_size((100, 24)).columns - 2
        super().__init__(prog, max_help_position=40, width=width)

    def _get_help_string(self, action: argparse.Action) -> str:
        plain = isinstance(action.default, int | float | str | Path) and action.default is not False
        shown = plain and action.default != argparse.SUPPRESS
        return f"{action.help or ''}{' [%(default)s]' if shown else ''}"


class Parser(argparse.ArgumentParser):
    """Answers what is wrong with one line; a flag that does not exist, with the nearest."""

    def __init__(self, **made: Any):
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **made})
        self.later: tuple[str, ...] = ()  # flags that begin so are not known yet

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--config\.\S+: )?", "", message)
        if missing := message.removeprefix("the following arguments are required: "):
            message = message if missing == message else f"{missing} is missing; see --help"
        stop(message)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        for arg in given[: given.index("--") if "--" in given else None]:
            flag = arg.partition("=")[0]
            known = flag in self._option_string_actions or flag.startswith(self.later)
            if arg.startswith("--") and " " not in flag and not known and not self._subparsers:
                self.error(self._unknown(flag))
        return super().parse_known_args(given, namespace)

    def _unknown(self, flag: str) -> str:
        name = flag.lstrip("-")
        if name.startswith("config."):
            return settings.unknown_key(name.removeprefix("config."))
        known = {f.lstrip("-"): "" for f in self._option_string_actions if f.startswith("--")}
        near = [f"--{one}" for one in nearest(name, known)] or ["--help"]
        return f"{flag} is no flag; nearest: {', '.join(near)}"


def _add_settings(
    flags: argparse.ArgumentParser, known: Mapping[str, Setting], shown: Mapping[str, Any]
) -> None:
    """A flag for each setting, in sections; help shows the values in `shown`."""
    sections: dict[str, Any] = {}
    for key, one in known.items():
        group = key.rpartition(".")[0]
        if group not in sections:
            sections[group] = flags.add_argument_group(f"config.{group}", settings.about(group))
        plain = plain_type(one.kind)
        sections[group].add_argument(
            f"--config.{key}",
            type=_value(key, one.kind),
            default=argparse.SUPPRESS,
            metavar=_LABELS.get(str(one.kind) if plain is tuple else plain.__name__, "VALUE"),
            help=_help(one, shown.get(key)) if shown else "",
            **({"nargs": "?", "const": True} if plain is bool else {}),
        )


_LABELS = {
    "int": "INT", "float": "FLOAT", "str": "TEXT", "bool": "BOOL",
    "tuple[int, ...]": "INT,INT", "tuple[float, ...]": "FLOAT,FLOAT", "tuple[str, ...]": "TEXT",
}  # fmt: skip


def _help(one: Setting, value: Any) -> str:
    parts = [one.meaning] if one.meaning else []
    parts += [either(list(one.choices))] if one.choices else []
    if isinstance(value, tuple) and not any(isinstance(part, str) for part in value):
        value = ",".join(map(str, value)) or None
    told = "; ".join(parts) + ("" if value is None else f" [{value}]")
    return told.strip().replace("%", "%%")


def _value(key: str, kind: Any) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        try:
            return sources.parse(text, kind)
        except (ValueError, KeyError):
            name = plain_type(kind).__name__
            raise argparse.ArgumentTypeError(
                f"{key}={text!r} is not of type {name}; give a value that is"
            ) from None

    return value


def on_disk(text: str) -> str:
    """A file or folder, which no address of another machine is."""
    try:
        files.check_on_disk(text, "this")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("this=")) from None
    return text


def path(text: str) -> Path:
    return Path(on_disk(text))


def at_least(low: int) -> Callable[[str], int]:
    """A whole number from `low`."""

    def number(text: str) -> int:
        try:
            if (found := int(text)) >= low:
                return found
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {low}; give one")

    return number


def counts(text: str) -> tuple[int, ...]:
    """Loop counts, as 1,4,12."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text} are no whole numbers from 1; as 1,4,12")
    return tuple(sorted({int(part) for part in parts}))


def _some_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def some(text: str) -> tuple[str, ...]:
        if unknown := [part for part in text.split(",") if part not in choices]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: choose from {', '.join(choices)}")
        return tuple(text.split(","))

    return some


if __name__ == "__main__":
    main()
