"""Settings as they are given: frozen dataclasses, their ConfigDict form, and plain-English checks.

The dataclasses below are the one place where a setting has its name, type, default and meaning.
`default_config()` turns them into an `ml_collections.ConfigDict`, which the files under `configs/`
edit and `--config.group.field=value` overrides; `Settings.from_dict` turns the result back and
checks it. A field whose default is None follows from other fields or from the data:
looped_jax/resolve.py fills it in, and gives the Config of config/resolved.py.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

from ml_collections import config_dict

from looped_jax.config.nearest import nearest
from looped_jax.config.options import (
    Embeddings,
    LoopDistributions,
    Objectives,
    Optimizers,
    Options,
    Packings,
    Parts,
    Rules,
    Tasks,
    WeightGroups,
    at_least,
    on_disk,
    one_of,
    setting,
    share,
)
from looped_jax.config.registry import (
    EMBEDDINGS,
    LOOP_DISTRIBUTIONS,
    LOOP_RULES,
    OBJECTIVES,
    OPTIMIZERS,
    PACKINGS,
    TASKS,
)
from looped_jax.config.setting_tree import (
    Setting,
    built,
    check_values,
    config_dict_of,
    fields,
    leaves,
    plain,
    registered_in,
    settings_of,
)
from looped_jax.config.transformer_settings import (
    DTYPES,
    InitSettings,
    MLPSettings,
    NormSettings,
    QKSettings,
    RopeSettings,
    ShortWindowSettings,
)
from looped_jax.errors import ConfigError

PERFORMANCE = ("remat", "gather", "loss_chunk", "kernel")  # model settings that change no result
# Settings by the names that they had before, in files and run folders that were made then.
RENAMED = {
    "train.inside_every": "train.diagnostics_every",
    "data.follow_hosts": "data.allow_host_change",
}
REMATS = ("loop", "offload", "dots", "none")
PARAMETER_COUNTS = ("all", "unique", "usage_weighted", "flop_matched")
CURRICULA = ("none", "linear", "sqrt", "switch")


@dataclass(frozen=True)
class ModelSettings:
    """The looped transformer: `layers` blocks run `loops` times. Symbols: model/transformer.py."""

    variant: str = one_of(LOOP_RULES, "FLT", "the loop rule")
    layers: int = at_least(1, 6, "L, blocks in the loop")
    loops: int = at_least(1, 12, "K, times the blocks are run")
    width: int | None = at_least(2, None, "D; by default width_per_layer · layers")
    width_per_layer: int = at_least(1, 64, "by default rounded up to whole heads of head_width")
    heads: int | None = at_least(1, None, "H; by default the fewest of at most 128 channels")
    head_width: int | None = at_least(2, None, "Dh; by default D / H, and need not divide D")
    kv_heads: int | None = at_least(1, None, "G; by default H; fewer is grouped-query attention")
    attention: str = one_of(("full", "mla"), "full", "mla: keys and values from a small latent")
    latent_rank: int = at_least(1, 128, "R, width of that latent")
    window_pattern: str = setting("L", "tiled over layers: L full context, S a short window")
    long_window: int | None = at_least(1, None, "keys that L layers see, itself among them")
    embedding: str = one_of(EMBEDDINGS, "separate", "how tokens become vectors, and states logits")
    seq_len: int = at_least(2, 1024, "T in training; also sets the window of S layers")
    vocab_size: int | None = at_least(2, None, "V; by default the tokenizer's")
    loss: str = one_of(
        OBJECTIVES, "END", "what is minimised; END, FEW and STEP score last, last third, all loops"
    )
    dtype: str = one_of(DTYPES, "bfloat16", "of products; weights, logits and loss stay float32")
    remat: str = one_of(
        (*REMATS, "auto"),
        "loop",
        "what backward recomputes: see model/loop_scan.py; auto: no more than memory asks for",
    )
    gather: str = one_of(
        ("step", "layer"), "step", "when what mesh.fsdp cuts is gathered: see docs/devices.md"
    )
    kernel: str = one_of(
        ("auto", "xla", "cudnn", "splash"),
        "auto",
        "what computes attention; auto: the fused one of the device",
    )
    soft_cap: float = at_least(0.0, 15.0, "c, of logits z: c · tanh(z / c); 0 = none")
    loss_chunk: int | None = at_least(
        1, None, "tokens whose logits live at once; by default of 168 million logits"
    )
    norm: NormSettings = field(default_factory=NormSettings)
    mlp: MLPSettings = field(default_factory=MLPSettings)
    rope: RopeSettings = field(default_factory=RopeSettings)
    qk: QKSettings = field(default_factory=QKSettings)
    short_window: ShortWindowSettings = field(default_factory=ShortWindowSettings)
    init: InitSettings = field(default_factory=InitSettings)
    parts: Parts = field(default_factory=Parts)  # techniques by name: model/parts/
    rules: Rules = field(default_factory=Rules)  # settings of loop rules, by name
    embeddings: Embeddings = field(default_factory=Embeddings)  # settings of embeddings, by name
    objectives: Objectives = field(default_factory=Objectives)  # settings of losses, by name

    def check(self) -> None:
        """Raises ConfigError for values that cannot be together, as the check() of other groups."""
        if not self.window_pattern or set(self.window_pattern) - set("LS"):
            raise ConfigError(
                f"model.window_pattern={self.window_pattern!r} must be made of L (full) and S "
                "(short); for example SSL"
            )


@dataclass(frozen=True)
class OptimConfig:
    """Muon for matrices, AdamW for embedding, head, and scalars and vectors of parts."""

    optimizer: str = one_of(OPTIMIZERS, "muon", "what updates the weights: see training/optimizers")
    matrix_learning_rate: float = at_least(0.0, 0.02, "Muon, or of the matrices")
    embedding_learning_rate: float = at_least(
        0.0, 0.2, "AdamW, of the embedding, times (D / 768) ** -0.5"
    )
    head_learning_rate: float = at_least(0.0, 0.004, "AdamW, of the head, times (D / 768) ** -0.5")
    vector_learning_rate: float = at_least(0.0, 0.02, "AdamW, of scalars and vectors, likewise")
    beta1: float = share(0.8, "AdamW, decay of the mean gradient")
    beta2: float = share(0.95, "AdamW, decay of the mean square")
    eps: float = at_least(0.0, 1e-10, "AdamW, added to the root of the mean square")
    weight_decay: float = at_least(0.0, 0.0, "AdamW, decoupled, times its learning rate")
    momentum_start: float = share(0.85, "Muon, at the first step")
    momentum_end: float = share(0.95, "Muon, after its warm-up")
    momentum_warmup_steps: int = at_least(0, 300, "Muon, steps from one to the other, linear")
    newton_schulz_steps: int = at_least(1, 5, "Muon, iterations that orthogonalise an update")
    newton_schulz_dtype: str = one_of(DTYPES, "bfloat16", "Muon, what they compute in")
    grad_clip_norm: float = at_least(0.0, 1.0, "largest global gradient norm; 0 = no clipping")
    warmup_ratio: float = share(0.0, "share of all steps in which the rates rise")
    warmup_steps: int | None = at_least(0, None, "in which they rise, instead of a share")
    warmdown_ratio: float = share(0.2, "share of all steps in which they fall")
    warmdown_steps: int | None = at_least(1, None, "in which they fall, instead of a share")
    warmdown_rest: bool = setting(
        False, "they fall in all steps after the warm-up, instead of a share, however many"
    )
    warmdown_shape: str = one_of(("linear", "cosine"), "linear", "how they fall")
    final_lr_fraction: float = share(0.0, "learning rate at the end, as a share of the peak")
    reference_batch_tokens: int | None = at_least(
        1, None, "that the rates are meant for: times √(tokens_per_step / it); by default as given"
    )
    groups: WeightGroups = field(default_factory=WeightGroups)  # of weights, by name
    optimizers: Optimizers = field(default_factory=Optimizers)  # own settings of each

    def check(self) -> None:
        rise, fall, steps = self.warmup_ratio, self.warmdown_ratio, self.warmdown_steps
        if rise and self.warmup_steps is not None:
            raise ConfigError(
                f"optim.warmup_ratio={rise} and optim.warmup_steps={self.warmup_steps} both say "
                "how long the rates rise; give one"
            )
        own_fall = fall not in (0, type(self).warmdown_ratio)
        if own_fall and steps is not None:
            raise ConfigError(
                f"optim.warmdown_ratio={fall} and optim.warmdown_steps={steps} both say how long "
                "the rates fall; leave one out, or give optim.warmdown_ratio=0"
            )
        if self.warmdown_rest and (own_fall or steps is not None):
            name = "warmdown_ratio" if steps is None else "warmdown_steps"
            raise ConfigError(
                f"optim.warmdown_rest=True and optim.{name}={getattr(self, name)} both say how "
                f"long the rates fall; give optim.warmdown_rest=False, or leave optim.{name} out"
            )
        if steps is None and not self.warmdown_rest and rise + fall > 1:
            raise ConfigError(
                f"optim.warmup_ratio={rise} and optim.warmdown_ratio={fall} overlap; let them sum "
                "to at most 1"
            )


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from, and how text becomes rows of tokens."""

    task: str = one_of(TASKS, "text", "what is learned: see looped_jax/tasks")
    path: str = on_disk("builtin", "a .txt, .jsonl or .parquet file, a folder of them, or builtin")
    val_shard: str | None = setting(
        None, "file that validates; by its name, else the last: see data/corpus.py"
    )
    val_share: float | None = at_least(
        0.0, None, "of documents that validate, instead of a file; 0.05 of one file", high=1.0
    )
    train_shards: int | None = at_least(1, None, "how many of the others; by default all")
    shuffle_seed: int | None = at_least(
        0, None, "documents and rows in another order; by default as they stand", high=2**32 - 1
    )
    order: str = one_of(
        ("epochs", "random"), "epochs", "of rows; random: each begins anywhere, as nanoGPT's do"
    )
    tokenizer: str | None = on_disk(
        None,
        "a tokenizer.json, bytes or characters; else one is trained on the corpus, once",
        none="train",
    )
    tokenizer_vocab_size: int = at_least(265, 4096, "entries of the trained tokenizer")
    bos_token: str | None = setting(
        None, "document start; by default the first that the tokenizer has of its own"
    )
    packing: str = one_of(PACKINGS, "stream", "how documents become rows: see data/packing")
    packings: Packings = field(default_factory=Packings)  # settings of packings, by name
    workers: int = at_least(0, 0, "processes that read and tokenize; 0 = a background thread")
    prefetch: int = at_least(1, 2, "batches kept ready")
    core_bundle: str | None = on_disk(None, "folder of the CORE bundle; by default the cache's")
    tasks: Tasks = field(default_factory=Tasks)  # own settings of each
    allow_host_change: bool = setting(
        False, "resume on another number of hosts: same place, another order"
    )


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; one of them may be -1: what is left."""

    data: int = at_least(-1, -1, "copies of the weights, each with its share of the batch")
    fsdp: int = at_least(-1, 1, "weights and optimizer state in shards: see model.gather")
    tensor: int = at_least(-1, 1, "heads, hidden units and vocabulary in shards")

    def check(self) -> None:
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size == 0:
                raise ConfigError(f"mesh.{axis}=0 is no size; give 1 or more, or -1 for the rest")
        if list(sizes.values()).count(-1) > 1:
            raise ConfigError(
                f"mesh={sizes} leaves more than one axis open; give -1 to one at most"
            )


@dataclass(frozen=True)
class LoopSamplingConfig:
    """Loops of a training step: drawn, growing, or with gradients through the last ones alone."""

    distribution: str = one_of(
        LOOP_DISTRIBUTIONS, "fixed", "of the loops: see training/loop_distributions.py"
    )
    per: str = one_of(("step", "sequence"), "step", "what has a count of its own")
    backward_loops: int | None = at_least(
        1, None, "k, last loops that gradients pass, at most; by default model.loops"
    )
    curriculum: str = one_of(CURRICULA, "none", "how drawn counts grow: see docs/sampled_loops.md")
    backward_curriculum: str = one_of(CURRICULA, "none", "how k grows")
    curriculum_share: float = share(1.0, "of all steps, after which they have grown")
    distributions: LoopDistributions = field(default_factory=LoopDistributions)  # own settings

    @property
    def on(self) -> bool:
        """Whether steps differ from model.loops loops with gradients through all of them."""
        curricula = (self.curriculum, self.backward_curriculum)
        return (self.distribution, self.backward_loops, *curricula) != (
            "fixed", None, "none", "none",
        )  # fmt: skip

    def longest(self, loops: int) -> int:
        """k, the most loops that gradients pass, where model.loops is `loops`."""
        return self.backward_loops or loops


@dataclass(frozen=True)
class TrainSettings:
    """The run: length, batch, and what happens how often (in steps; 0 = only at the end)."""

    run_dir: str | None = on_disk(
        None, "folder of the run; by default runs/ and a name that tells what differs"
    )
    seed: int = at_least(0, 0, "of the first weights, and of rows that a task generates")
    steps: int | None = at_least(1, None, "of the optimizer; by default as the next two say")
    target_flops: float | None = at_least(
        1.0,
        None,
        "of training, every loop counted, that steps follow from where they are not given",
    )
    tokens_per_parameter: float = at_least(
        0.0, 20.0, "trained on, where neither steps nor target_flops are given"
    )
    scaled_by: str = one_of(
        PARAMETER_COUNTS, "all", "parameters that count for it: see model/parameter_counts.py"
    )
    scaled_from_layers: int | None = at_least(
        1,
        None,
        "of the model that batch, rates and decay are for; this one's follow, as in "
        "config/depth_scaling.py",
    )
    tokens_per_step: int = at_least(1, 524_288, "of a step, over all devices and micro-batches")
    batch_size: int = at_least(1, 8, "sequences per device and micro-batch")
    log_every: int = at_least(1, 10, "steps between console lines; files have every step")
    stall_minutes: float = at_least(
        0.0, 10.0, "at one place until the console says which process is where; 0 = never"
    )
    eval_every: int = at_least(0, 250, "steps between validations; 0 = only at the end")
    eval_first: bool = setting(True, "validate before the first step of a new run, too")
    eval_tokens: int = at_least(1, 10_485_760, "validation targets scored each time, at most")
    eval_loops: tuple[int, ...] = setting(
        (1, 3, 6, 9, 12), "loop counts that are scored, in one pass; the trained K always is"
    )
    core_every: int = at_least(
        0, 0, "steps between CORE of a text model, and at the end; 0 = never"
    )
    core_examples: int = at_least(1, 500, "of each CORE task, at most")
    diagnostics_every: int = at_least(0, 0, "steps between norms per loop and layer; 0 = never")
    save_every: int = at_least(0, 250, "steps between checkpoints; 0 = only at the end")
    save_minutes: float = at_least(
        0.0, 0.0, "minutes after which a checkpoint is due at the latest; 0 = no limit"
    )
    keep: int = at_least(1, 2, "newest checkpoints kept")
    keep_every: int = at_least(0, 0, "steps between checkpoints kept for good; 0 = none")
    keep_best: int = at_least(0, 0, "checkpoints kept for the lowest validation bits per byte")
    loop_sampling: LoopSamplingConfig = field(default_factory=LoopSamplingConfig)
    init_from: str | None = on_disk(None, "RUN or RUN@STEP: a new run that starts with its weights")
    init_optimizer: bool = setting(
        False, "init_from with its optimizer's state; schedules start anew"
    )
    sample_every: int = at_least(0, 0, "steps between samples; 0 = only at the end")
    sample_tokens: int = at_least(0, 24, "tokens per prompt; 0 = no samples at all")
    sample_temperature: float = at_least(0.0, 0.0, "0 = the likeliest; else drawn by train.seed")
    sample_prompts: tuple[str, ...] = setting(
        ("The capital of France is", "If 5*x + 3 = 13, then x is"), "what samples begin with"
    )

    def check(self) -> None:
        if not self.eval_loops or any(not isinstance(k, int) or k < 1 for k in self.eval_loops):
            raise ConfigError(
                f"train.eval_loops={self.eval_loops} must be whole numbers from 1; as 1,3,6"
            )
        if self.sample_every and not self.sample_tokens:
            raise ConfigError(
                f"train.sample_every={self.sample_every} with train.sample_tokens=0 samples "
                "nothing; give train.sample_tokens=24, or leave train.sample_every out"
            )


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
        settings = built(Settings, values, renamed=RENAMED, unknown=unknown_key)
        check_values(settings)
        for group in (settings.model, settings.optim, settings.train, settings.mesh):
            group.check()
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON; `from_dict` is its inverse.

        What is registered and is as by default is left out: who does not have it needs not know.
        """
        return plain(self)

    def leaves(self, *, paths: bool = True) -> dict[str, Any]:
        """Every setting by its dotted name; without `paths` those that name no file or folder."""
        return {
            key: value
            for key, value, rule in leaves(self)
            if paths or not rule.get("on_disk", False)
        }

    def describe(self) -> str:
        """One `group.field = value` line per setting; parts that are off are left out."""
        off = tuple(f"model.parts.{n}." for n in self.model.parts if n not in self.model.parts.on())
        lines = self.leaves().items()
        return "\n".join(f"{key} = {value!r}" for key, value in lines if not key.startswith(off))


def all_settings(*, registered: bool = True) -> dict[str, Setting]:
    """Every setting by its dotted name.

    Those of what is registered import the model; without them the answer comes at once.
    """
    return settings_of(Settings, registered=registered)


def registered_groups() -> dict[str, type[Options]]:
    """The groups that hold settings of what is registered, by dotted name."""
    return registered_in(Settings)


def about(group: str) -> str:
    """One line on a group of settings, or on what is registered and has them, by dotted name."""
    owner, _, name = group.rpartition(".")
    if (options := registered_groups().get(owner)) is None:
        kind: Any = Settings
        for one in group.split("."):
            kind = fields(kind)[one][0]
        return kind.__doc__.splitlines()[0]
    thing = options.registry[name]
    told = thing.__doc__
    if options is Parts:  # one in each file, whose docstring says what it is: model/parts/base.py
        told = sys.modules[thing.__module__].__doc__ or told
    return (told or "").strip().partition("\n")[0]


def default_config() -> config_dict.ConfigDict:
    """The defaults as a type-checked ConfigDict, for files under configs/ to edit."""
    return config_dict_of(Settings)


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


def unknown_key(key: str) -> str:
    """The message for a dotted name that no setting has: its new name, or the nearest of all."""
    if key in RENAMED:
        return f"{key} is now {RENAMED[key]}"
    within = next((g for g in registered_groups() if key.startswith(f"{g}.")), None)
    known = {
        name: one.meaning
        for name, one in all_settings(registered=within is not None).items()
        if name.startswith(within or "")
    }
    groups = [name.partition(".")[0] for name in known]
    near = nearest(key, known if "." in key else dict.fromkeys(groups, "") | known)
    own = f"; import {registered_groups()[within].registry.one} of your own first" if within else ""
    return f"{key} is no setting; nearest: {', '.join(near or dict.fromkeys(groups))}{own}"
