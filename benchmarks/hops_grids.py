"""The grids of benchmarks/hops.py: three tasks on which looping pays, or shows where it stops."""

from __future__ import annotations

from typing import Any

RULES = ("FLT", "LT_ia", "LT_i", "FLT_res", "LT")
SEEDS = [0, 1, 2]
MATRIX, EMBEDDING = "optim.matrix_learning_rate", "optim.embedding_learning_rate"
# Rates by the sweep of `--rates`, see hops.md: of each row the best of four at what the row
# is judged by on the page, on two seeds that the page does not use.
RATES: dict[str, dict[str, dict[str, float]]] = {
    "chain_ends": {
        "FLT K=4": {MATRIX: 0.01, EMBEDDING: 0.05},
        "LT_i K=4": {MATRIX: 0.01, EMBEDDING: 0.05},
        "FLT_res K=4": {MATRIX: 0.02, EMBEDDING: 0.2},
        "LT K=4": {MATRIX: 0.04, EMBEDDING: 0.05},
        "one loop": {MATRIX: 0.02, EMBEDDING: 0.05},
        "flat, 4 layers": {MATRIX: 0.02, EMBEDDING: 0.05},
    },
    "steps": {
        "FLT K=4": {MATRIX: 0.01, EMBEDDING: 0.05},
        "LT_i K=4": {MATRIX: 0.01, EMBEDDING: 0.05},
        "FLT_res K=4": {MATRIX: 0.04, EMBEDDING: 0.05},
        "LT K=4": {MATRIX: 0.04, EMBEDDING: 0.05},
    },
    "hops": {
        "FLT K=4": {MATRIX: 0.01, EMBEDDING: 0.05},
        "one loop": {MATRIX: 0.02, EMBEDDING: 0.05},
    },
}
QUIET = {  # one validation, at the end
    "train.eval_every": 0,
    "train.eval_first": False,
    "train.save_every": 0,
    "train.keep": 1,
}
FLAT = {"model.layers": 4, "model.loops": 1}


def chain_ends(steps: int = 600) -> dict[str, Any]:
    """Two chains of eight, after training on chains of at most four, final answer only."""
    return {
        "config": "flt:chain_ends_16",
        "settings": {
            **QUIET,
            "train.steps": steps,
            "train.eval_loops": (*range(1, 17), 20, 24, 28, 32),
        },
        "rows": [
            *({"settings": {"model.variant": rule, "model.loops": 4}} for rule in RULES),
            {"label": "one loop", "settings": {"model.loops": 1}},
            {"label": "flat, 4 layers", "settings": FLAT},
        ],
        "seeds": SEEDS,
        "reference": "FLT K=4",
    }


def steps(steps: int = 500) -> dict[str, Any]:
    """Loop k owes the node k hops on. Eleven nodes, which divide no loop count that is quoted."""
    nodes = 11
    return {
        "config": "flt:steps",
        "settings": {
            **QUIET,
            "data.tasks.steps.nodes": nodes,
            "model.seq_len": nodes + 16,
            "train.tokens_per_step": 64 * (nodes + 16),
            "train.steps": steps,
            "train.eval_loops": tuple(range(1, 64)),
        },
        "rows": [{"settings": {"model.variant": rule, "model.loops": 4}} for rule in RULES],
        "seeds": SEEDS,
        "reference": "FLT K=4",
    }


def hops(steps: int = 600) -> dict[str, Any]:
    """One answer after up to four hops: four loops, one loop, one loop of as many FLOPs."""
    return {
        "config": "flt:hops",
        "settings": {**QUIET, "train.steps": steps, "train.eval_loops": tuple(range(1, 9))},
        "rows": [
            {"settings": {"model.variant": "FLT", "model.loops": 4}},
            {"label": "one loop", "settings": {"model.loops": 1}},
            {"label": "one loop, equal FLOPs", "settings": {"model.loops": 1}, "equal": "flops"},
        ],
        "seeds": SEEDS,
        "reference": "FLT K=4",
    }


GRIDS = {"chain_ends": chain_ends, "steps": steps, "hops": hops}


def rated(grid: dict[str, Any], rates: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The grid with each row at its own rates, by label; `FLT K=4` where it has no label.

    With one layer LT_ia is FLT, and one loop of as many FLOPs takes the rates of one loop.
    """
    rows = []
    for row in grid["rows"]:
        label = row.get("label") or f"{row['settings']['model.variant']} K=4"
        like = label.removesuffix(", equal FLOPs").replace("LT_ia", "FLT")  # which are the same
        settings = row["settings"] | rates.get(like, {})
        rows.append(row | {"label": label, "settings": settings})
    return grid | {"rows": rows}


def candidates(name: str) -> dict[str, Any]:
    """The rows of a grid at several rates, on seeds of its own."""
    grid = GRIDS[name]()
    rates = [(0.01, 0.05), (0.02, 0.05), (0.04, 0.05), (0.02, 0.2)]
    rows = []
    for row in rated(grid, {})["rows"]:
        if not row.get("equal") and row["label"] != "LT_ia K=4":
            for matrix, embedding in rates:
                settings = row["settings"] | {MATRIX: matrix, EMBEDDING: embedding}
                told = f"{row['label']}, matrix {matrix:g}, embedding {embedding:g}"
                rows.append({"label": told, "settings": settings})
    return grid | {"rows": rows, "seeds": [10, 11], "reference": rows[0]["label"]}
