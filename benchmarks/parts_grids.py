"""The grids of benchmarks/parts.py: a row for all that is registered, in three places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from looped_jax.experiments.grid import Grid

Values = Mapping[str, Any]  # settings by dotted name
BASELINE = "FLT K=4"
EQUAL_FLOPS = ", equal FLOPs"  # behind the label of a row that is as long as it may cost
SEEDS = (0, 1, 2)
CLOSE = 0.01  # of the baseline's FLOPs: a row within needs no second one

# Registered and without a row, because training from the first step cannot measure it.
LEFT_OUT = {"EXIT_GATE": "trains a gate alone, on a model that is trained already"}
# Registered and without a row so far.
NOT_MEASURED: tuple[str, ...] = ("attention_dropout", "biases", "dropout", "learned_positions")

VECTORS_RATE = {"optim.groups.low_rank.learning_rate": 0.02}  # the rate of vectors


def part(name: str, **settings: Any) -> dict[str, Any]:
    """Settings of a model that has the part."""
    own = {f"model.parts.{name}.{key}": value for key, value in settings.items()}
    return {f"model.parts.{name}.on": True, **own}


ROWS: dict[str, dict[str, Values]] = {
    "loops": {"one loop": {"model.loops": 1}},
    "loop rules": {
        rule: {"model.variant": rule}
        for rule in ("LT_ia", "LT_i", "FLT_res", "LT", "diagonal", "gate", "linear")
    },
    "parts": {
        "backout": part("backout"),
        "branch_gains": part("branch_gains"),
        "carried_scale": part("carried_scale"),
        "carried_scale, LT": part("carried_scale") | {"model.variant": "LT"},
        "coda, 1 layer": part("coda", layers=1),
        "damping": part("damping"),
        "hyper_connections": part("hyper_connections"),
        "hyper_connections, each loop": part("hyper_connections", each_loop=True),
        "kv_shift": part("kv_shift"),
        "loop_adapters": part("loop_adapters"),
        "loop_adapters, rate 0.02": part("loop_adapters") | VECTORS_RATE,
        "loop_embedding, learned": part("loop_embedding"),
        "loop_embedding, sinusoidal": part("loop_embedding", kind="sinusoidal"),
        "loop_gains": part("loop_gains"),
        "loop_lora": part("loop_lora"),
        "loop_lora, rate 0.02": part("loop_lora") | VECTORS_RATE,
        "prelude, 1 layer": part("prelude", layers=1),
        "residual_scalars": part("residual_scalars"),
        "residual_scalars, each loop": part("residual_scalars", each_loop=True),
        "residual_scale": part("residual_scale"),
        "sandwich_norm, branch": part("sandwich_norm"),
        "sandwich_norm, sum": part("sandwich_norm", after="sum"),
        "smear": part("smear"),
        "state_init, normal": part("state_init"),
        "state_init, like_init": part("state_init", kind="like_init"),
        "state_init, embedding": part("state_init", kind="embedding"),
        "state_noise": part("state_noise"),
        "value_embedding": part("value_embedding"),
        "value_embedding, gated": part("value_embedding", gate=True),
    },
    "embeddings": {
        "factorised, rank 32": {
            "model.embedding": "factorised", "model.embeddings.factorised.rank": 32,
        },
        "tied": {"model.embedding": "tied"},
        "tied, rate 0.004": {"model.embedding": "tied", "optim.embedding_learning_rate": 0.004},
    },
    "objectives": {
        "FEW": {"model.loss": "FEW"},
        "STEP": {"model.loss": "STEP"},
        "WEIGHTED": {"model.loss": "WEIGHTED"},
        "SELF_WEIGHTED": {"model.loss": "SELF_WEIGHTED"},
        "FIXED_POINT": {"model.loss": "FIXED_POINT"},
        "RANDOM": {"model.loss": "RANDOM"},
        "EXIT and exit_gate": part("exit_gate") | {"model.loss": "EXIT"},
    },
    "sampled loops": {
        "Poisson": {"train.loop_sampling.distribution": "poisson"},
        "Poisson, gradients through 2": {
            "train.loop_sampling.distribution": "poisson", "train.loop_sampling.backward_loops": 2,
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where all rows are trained, and what they are judged by.

    metric: of the last validation, after `loops` loops, by default those of training; a model that
    does not loop is judged as it was trained. also: a second one, shown beside it
    """

    title: str
    config: str
    settings: Values
    metric: str
    loops: int | None = None
    also: tuple[str, int | None] | None = None


QUIET = {  # one validation, at the end
    "train.eval_every": 0,
    "train.eval_first": False,
    "train.save_every": 0,
    "train.keep": 1,
    "train.sample_tokens": 0,
}
PLACES = {
    "text": Place(
        "text, bits per byte",
        "flt:tiny",
        {
            **QUIET,
            "model.width": 64,
            "model.seq_len": 64,
            "data.tokenizer_vocab_size": 1_024,
            "train.steps": 160,
            "train.tokens_per_step": 8 * 64,
            "train.batch_size": 8,
            "train.eval_tokens": 16_384,
            "train.eval_loops": (1, 4, 8),
        },
        "bpb",
        also=("bpb", 8),
    ),
    "chain_ends": Place(
        "chain ends, accuracy on far ones after 16 loops",
        "flt:chain_ends_16",
        {
            **QUIET,
            "data.tasks.chain_end.nodes": 12,
            "model.seq_len": 24,
            "train.steps": 300,
            "train.tokens_per_step": 32 * 24,
            "train.batch_size": 32,
            "train.eval_tokens": 2_048,
            "train.eval_loops": (4, 8, 16),
        },
        "accuracy",
        loops=16,
        also=("accuracy_trained", None),
    ),
    "hops": Place(
        "hops, accuracy",
        "flt:hops",
        {
            **QUIET,
            "data.tasks.hops.nodes": 6,
            "model.seq_len": 22,
            "train.steps": 300,
            "train.tokens_per_step": 32 * 22,
            "train.batch_size": 32,
            "train.eval_tokens": 2_048,
            "train.eval_loops": (4, 8),
        },
        "accuracy",
        also=("accuracy", 8),
    ),
}


def rows() -> dict[str, Values]:
    """All rows beside the baseline, by label."""
    return {label: values for of_kind in ROWS.values() for label, values in of_kind.items()}


def names(values: Values) -> set[str]:
    """What is registered that a row's settings choose: parts, rule, embedding and objective."""
    parts = {key.split(".")[2] for key, on in values.items() if key.endswith(".on") and on}
    chosen = ("model.variant", "model.embedding", "model.loss")
    return parts | {values[key] for key in chosen if key in values}


def equal_tokens(place: str, only: Sequence[str] = ()) -> Grid:
    """The baseline and its rows, or those named `only`, each as long as the place says."""
    at = PLACES[place]
    listed: list[dict[str, Any]] = [{"label": BASELINE, "settings": {"model.variant": "FLT"}}]
    listed += [
        {"label": label, "settings": dict(values)}
        for label, values in rows().items()
        if not only or label in only
    ]
    values = {"config": at.config, "settings": dict(at.settings), "rows": listed}
    return Grid.from_dict(values | {"seeds": list(SEEDS), "reference": BASELINE}, name=place)


def grid(place: str, only: Sequence[str] = ()) -> Grid:
    """These rows, and each whose FLOPs are others again, with as many steps as cost the baseline's.

    Raises ConfigError.
    """
    found = equal_tokens(place, only)
    spent = {run.row.label: run.flops for run in found.runs(Path()) if run.seed == SEEDS[0]}
    again = [
        replace(row, label=row.label + EQUAL_FLOPS, equal="flops")
        for row in found.rows
        if abs(spent[row.label] / spent[BASELINE] - 1) > CLOSE
    ]
    return replace(found, rows=(*found.rows, *again))
