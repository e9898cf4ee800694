"""Settings as they are given: frozen dataclasses, their ConfigDict form, and plain-English checks.

The dataclasses below are the one place where a setting has its name, type, default and meaning.
`default_config()` turns them into an `ml_collections.ConfigDict`, which the files under `configs/`
edit and `--config.group.field=value` overrides; `Settings.from_dict` turns the result back and
checks it. A field whose default is None follows from other fields or from the data:
looped_jax/resolve.py fills it in, and gives the Config of config/resolved.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar

from ml_collections import config_dict

from looped_jax.config.registry import LOOP_RULES, OBJECTIVES, OPTIMIZERS, PARTS, TASKS, Registry
from looped_jax.errors import ConfigError

DTYPES = ("float32", "bfloat16")
PERFORMANCE = ("remat", "loss_chunk", "kernel")  # model settings that change no result
# Settings by the names that they had before, in files and run folders that were made then.
RENAMED = {
    "train.inside_every": "train.diagnostics_every",
    "data.follow_hosts": "data.allow_host_change",
}
REMATS = ("loop", "offload", "dots", "none")


class Options(Mapping[str, Any]):
    """Settings of what is registered in `registry`, by name; hashable.

    A registered class that has settings names their dataclass as its attribute `Settings`.
    """

    registry: ClassVar[Registry]

    def __init__(self, settings: Mapping[str, Any] | None = None):
        self._settings = dict(settings or {})
        if unknown := [name for name in self._settings if name not in self.registry]:
            kind = self.registry.kind
            raise ConfigError(
                f"{unknown[0]} is no {kind}; choose {either(list(self.registry))}, or import a "
                f"{kind} of your own first"
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


class Objectives(Options):
    """Settings of objectives that have some."""

    registry = OBJECTIVES


class Optimizers(Options):
    """Settings of optimizers that have some of their own."""

    registry = OPTIMIZERS


class Tasks(Options):
    """Settings of tasks that have some of their own."""

    registry = TASKS


def _at_least(low: float, default: Any, high: float = math.inf) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


def _share(default: float) -> Any:
    return _at_least(0.0, default, 1.0)


def _one_of(choices: Collection[str], default: str) -> Any:
    return field(default=default, metadata={"choices": choices})


def _or_word(word: str) -> Any:
    """None by default, which a command line cannot say; it says `word`."""
    return field(default=None, metadata={"none": word})


@dataclass(frozen=True)
class ModelSettings:
    """The looped transformer: `layers` blocks run `loops` times. Symbols: model/transformer.py."""

    variant: str = _one_of(LOOP_RULES, "FLT")  # the loop rule
    layers: int = _at_least(1, 6)  # L, blocks in the loop
    loops: int = _at_least(1, 12)  # K, times the blocks are run
    width: int | None = _at_least(2, None)  # D; 64 · layers
    heads: int | None = _at_least(1, None)  # H; the fewest of at most 128 channels
    kv_heads: int | None = _at_least(1, None)  # G; = heads. Fewer: grouped-query attention
    attention: str = _one_of(("full", "mla"), "full")  # mla: keys and values from a small latent
    latent_rank: int = _at_least(1, 128)  # R, width of that latent
    window_pattern: str = "L"  # tiled over layers: L full context, S a quarter of seq_len
    seq_len: int = _at_least(2, 1024)  # T in training; also sets the window of S layers
    vocab_size: int | None = _at_least(2, None)  # V; the tokenizer's
    loss: str = _one_of(OBJECTIVES, "END")  # loops scored: last, last third, all
    dtype: str = _one_of(DTYPES, "bfloat16")  # compute; weights, logits and loss stay float32
    remat: str = _one_of(REMATS, "loop")  # what backward recomputes: see model/loop_scan.py
    kernel: str = _one_of(("auto", "xla", "cudnn", "splash"), "auto")  # computes attention
    loss_chunk: int | None = _at_least(1, None)  # tokens whose logits live at once; 2^26 logits
    parts: Parts = field(default_factory=Parts)  # techniques by name: model/parts/
    rules: Rules = field(default_factory=Rules)  # settings of loop rules, by name
    objectives: Objectives = field(default_factory=Objectives)  # settings of losses, by name


@dataclass(frozen=True)
class OptimConfig:
    """Muon for matrices, AdamW for embedding, head, and scalars and vectors of parts."""

    optimizer: str = _one_of(OPTIMIZERS, "muon")  # see training/optimizers.py
    matrix_learning_rate: float = _at_least(0.0, 0.02)  # Muon
    embedding_learning_rate: float = _at_least(0.0, 0.2)  # AdamW, times (D / 768) ** -0.5
    head_learning_rate: float = _at_least(0.0, 0.004)  # AdamW, times (D / 768) ** -0.5
    vector_learning_rate: float = _at_least(0.0, 0.02)  # AdamW, scalars and vectors, likewise
    beta1: float = _share(0.8)  # AdamW
    beta2: float = _share(0.95)
    eps: float = _at_least(0.0, 1e-10)
    weight_decay: float = _at_least(0.0, 0.0)  # AdamW, decoupled, times its learning rate
    momentum_start: float = _share(0.85)  # Muon, linear to momentum_end ...
    momentum_end: float = _share(0.95)
    momentum_warmup_steps: int = _at_least(0, 300)  # ... over so many steps
    newton_schulz_steps: int = _at_least(1, 5)
    newton_schulz_dtype: str = _one_of(DTYPES, "bfloat16")
    grad_clip_norm: float = _at_least(0.0, 1.0)  # of the global gradient norm; 0 = no clipping
    warmup_ratio: float = _share(0.0)  # shares of all steps
    warmdown_ratio: float = _share(0.2)
    final_lr_fraction: float = _share(0.0)  # learning rate at the end, as a share of the peak
    optimizers: Optimizers = field(default_factory=Optimizers)  # own settings of each


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from, and how text becomes rows of tokens."""

    task: str = _one_of(TASKS, "text")  # what is learned: see looped_jax/tasks
    path: str = "builtin"  # a .txt, .jsonl or .parquet file, a folder of them, or "builtin"
    val_shard: str | None = None  # file that validates; by its name, else the last: data/corpus.py
    val_share: float | None = _at_least(0.0, None, 1.0)  # of documents, instead; 0.05 of one file
    train_shards: int | None = _at_least(1, None)  # only the first so many of the others
    shuffle_seed: int | None = _at_least(0, None, 2**32 - 1)  # documents in an order of its own
    tokenizer: str | None = _or_word("train")  # a tokenizer.json; else trained on the corpus, once
    tokenizer_vocab_size: int = _at_least(265, 4096)  # entries of the trained tokenizer
    bos_token: str | None = None  # document start; the first that the tokenizer has of its own
    workers: int = _at_least(0, 0)  # processes that read and tokenize; 0 = a background thread
    prefetch: int = _at_least(1, 2)  # batches kept ready
    core_bundle: str | None = None  # folder of the CORE bundle; the cache's own
    tasks: Tasks = field(default_factory=Tasks)  # own settings of each
    allow_host_change: bool = False  # resume on another number of hosts: same place, another order


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; one of them may be -1: what is left."""

    data: int = _at_least(-1, -1)  # copies of the weights, each with its share of the batch
    fsdp: int = _at_least(-1, 1)  # weights and optimizer state in shards, gathered once a step
    tensor: int = _at_least(-1, 1)  # heads, hidden units and vocabulary in shards


@dataclass(frozen=True)
class TrainSettings:
    """The run: length, batch, and what happens how often (in steps; 0 = only at the end)."""

    run_dir: str | None = None  # runs/<variant>_K<loops>_L<layers>...
    seed: int = _at_least(0, 0)
    steps: int | None = _at_least(1, None)  # 20 · parameters // tokens_per_step
    tokens_per_step: int = _at_least(1, 524_288)  # over all devices and micro-batches
    batch_size: int = _at_least(1, 8)  # sequences per device and micro-batch
    log_every: int = _at_least(1, 10)  # console lines; TensorBoard and JSONL have every step
    eval_every: int = _at_least(0, 250)
    eval_first: bool = True  # and before the first step of a new run
    eval_tokens: int = _at_least(1, 10_485_760)  # validation targets scored each time, at most
    eval_loops: tuple[int, ...] = (1, 3, 6, 9, 12)  # in one pass; the trained K always is
    core_every: int = _at_least(0, 0)  # CORE of a text model, and at the end; 0 = never
    core_examples: int = _at_least(1, 500)  # of each of its tasks, at most
    diagnostics_every: int = _at_least(0, 0)  # norms per loop and layer; 0 = never
    save_every: int = _at_least(0, 250)
    save_minutes: float = _at_least(0.0, 0.0)  # and after so many minutes without; 0 = no limit
    keep: int = _at_least(1, 2)  # newest checkpoints kept
    keep_every: int = _at_least(0, 0)  # and those of every so many steps, for good; 0 = none
    keep_best: int = _at_least(0, 0)  # and so many with the lowest validation bits per byte
    init_from: str | None = None  # RUN or RUN@STEP: a new run that starts with its weights
    init_optimizer: bool = False  # and with its optimizer's state; schedules start anew
    sample_every: int = _at_least(0, 0)  # what the model makes of the prompts
    sample_tokens: int = _at_least(0, 24)  # tokens per prompt; 0 = no samples at all
    sample_temperature: float = _at_least(0.0, 0.0)  # 0 = the likeliest; else drawn by train.seed
    sample_prompts: tuple[str, ...] = ("The capital of France is", "If 5*x + 3 = 13, then x is")


@dataclass(frozen=True)
class Settings:
    """Everything a run is told."""

    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainSettings = field(default_factory=TrainSettings)

    @staticmethod
    def from_dict(values: Any) -> Settings:
        """Checked settings from a ConfigDict or plain nested dict. Raises ConfigError."""
        settings = _built(Settings, values, "")
        _validate(settings)
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON; `from_dict` is its inverse.

        What is registered and is as by default is left out: who does not have it needs not know.
        """
        return plain(self)

    def leaves(self) -> dict[str, Any]:
        """Every setting by its dotted name."""
        return {key: value for key, value, _ in _leaves(self, "")}

    def describe(self) -> str:
        """One `group.field = value` line per setting; parts that are off are left out."""
        off = tuple(f"model.parts.{n}." for n in self.model.parts if n not in self.model.parts.on())
        lines = self.leaves().items()
        return "\n".join(f"{key} = {value!r}" for key, value in lines if not key.startswith(off))


def fields(kind: Any) -> dict[str, tuple[Any, Any, Mapping[str, Any]]]:
    """Type, default and metadata of every field of a group of settings, by name."""
    if issubclass(kind, Options):
        return {name: (type(own), own, {}) for name, own in kind.defaults().items()}
    hints = typing.get_type_hints(kind)
    found: dict[str, tuple[Any, Any, Mapping[str, Any]]] = {}
    for f in dataclasses.fields(kind):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        found[f.name] = hints[f.name], default, f.metadata
    return found


def is_group(kind: Any) -> bool:
    """Whether a type is a group of settings, not a setting."""
    return isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, Options))


def setting_types(kind: Any = Settings, prefix: str = "") -> dict[str, Any]:
    """The type of every setting by its dotted name."""
    found: dict[str, Any] = {}
    for name, (inner, _, _) in fields(kind).items():
        key = f"{prefix}{name}"
        found |= setting_types(inner, f"{key}.") if is_group(inner) else {key: inner}
    return found


def default_config() -> config_dict.ConfigDict:
    """The defaults as a type-checked ConfigDict, for files under configs/ to edit."""
    return _default(Settings)


def _default(kind: Any) -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    for name, (inner, default, _) in fields(kind).items():
        if is_group(inner):
            config[name] = _default(inner)
        elif default is None:
            config[name] = config_dict.placeholder(plain_type(inner))
        else:
            config[name] = default
    return config


def _built(kind: Any, values: Any, prefix: str) -> Any:
    """A group of settings from nested values. Raises ConfigError for what is not one."""
    known, given = fields(kind), dict(values)
    for name in list(given):
        if (new := RENAMED.get(f"{prefix}{name}")) and new.rpartition(".")[2] in known:
            given[new.rpartition(".")[2]] = given.pop(name)
        elif name not in known:
            own = kind.registry.kind if issubclass(kind, Options) else None
            hint = f"; import a {own} of your own first" if own else ""
            raise ConfigError(unknown_key(name, known, prefix=prefix) + hint)
    built = {}
    for name, (inner, _, rule) in known.items():
        if is_group(inner):
            built[name] = _built(inner, given.get(name, {}), f"{prefix}{name}.")
        elif name in given:
            value = _typed(f"{prefix}{name}", given[name], inner)
            built[name] = None if value == rule.get("none") else value
    return kind(built) if issubclass(kind, Options) else kind(**built)


def plain(value: Any) -> Any:
    """Settings, and whatever holds some, as plain values for JSON."""
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


def _leaves(settings: Any, prefix: str) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(dotted name, value, metadata) of every setting."""
    for name, (inner, _, metadata) in fields(type(settings)).items():
        value = settings[name] if isinstance(settings, Options) else getattr(settings, name)
        if is_group(inner):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, metadata


def parse_mesh(text: str) -> MeshConfig:
    """The mesh of "data=64,fsdp=8"; axes that are not named have one device. Raises ConfigError."""
    sizes = {axis.name: 1 for axis in dataclasses.fields(MeshConfig)}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not (size == "-1" or (size.isdecimal() and int(size))):
            raise ConfigError(
                f"--mesh={text}: {part!r} is no axis and size; give {', '.join(sizes)} with whole "
                "numbers from 1, or one -1 for what is left, as data=64,fsdp=8"
            )
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"--mesh={text} leaves more than one axis open; give -1 to one at most")
    return MeshConfig(**sizes)


# --- checks -------------------------------------------------------------------------------------


def unknown_key(key: str, known: typing.Iterable[str], *, prefix: str) -> str:
    """The message for a key that no setting has, with the nearest that exist."""
    near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.4) or list(known)
    return f"{prefix}{key} is no setting; nearest: {', '.join(prefix + n for n in near)}"


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


def either(options: Sequence[Any]) -> str:
    words = [str(o) for o in options]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _validate(config: Settings) -> None:
    for key, value, rule in _leaves(config, ""):
        if value is None:
            continue
        if "choices" in rule and value not in rule["choices"]:
            own = rule["choices"]
            hint = f"; import a {own.kind} of your own first" if isinstance(own, Registry) else ""
            raise ConfigError(f"{key}={value!r} is unknown; choose {either(list(own))}{hint}")
        if "low" in rule and not rule["low"] <= value <= rule["high"]:
            high = "or more" if rule["high"] == math.inf else f"to {rule['high']}"
            raise ConfigError(f"{key}={value} is out of range; give {rule['low']} {high}")
    m, o, t = config.model, config.optim, config.train
    if not m.window_pattern or set(m.window_pattern) - set("LS"):
        raise ConfigError(
            f"model.window_pattern={m.window_pattern!r} must be made of L (full) and S (short); "
            "for example SSL"
        )
    if o.warmup_ratio + o.warmdown_ratio > 1:
        raise ConfigError(
            f"optim.warmup_ratio={o.warmup_ratio} and optim.warmdown_ratio={o.warmdown_ratio} "
            "overlap; let them sum to at most 1"
        )
    if not t.eval_loops or any(not isinstance(k, int) or k < 1 for k in t.eval_loops):
        raise ConfigError(f"train.eval_loops={t.eval_loops} must be whole numbers from 1; as 1,3,6")
    if t.sample_every and not t.sample_tokens:
        raise ConfigError(
            f"train.sample_every={t.sample_every} with train.sample_tokens=0 samples nothing; "
            "give train.sample_tokens=24, or leave train.sample_every out"
        )
    sizes = dataclasses.asdict(config.mesh)
    for axis, size in sizes.items():
        if size == 0:
            raise ConfigError(f"mesh.{axis}=0 is no size; give 1 or more, or -1 for the rest")
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"mesh={sizes} leaves more than one axis open; give -1 to one at most")
