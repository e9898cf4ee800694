"""How far two programs may lie apart: rows with tolerances, curves, and their table and figure.

Tolerances start from what the reference's goldens allow in float32. Where the PyTorch program
itself loses more than a third of that to rounding (bfloat16, wide models, long runs), three times
its own loss takes their place: the JAX one may round differently, but hardly worse.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend has to be chosen first

LOGITS, LOSSES, GRADIENTS = 2e-5, 2e-5, 1e-4  # absolute, absolute, relative per tensor
# Of a training loss, by the type of Newton–Schulz. In bfloat16 either library's result for a single
# matrix lies 3 to 20% from the exact one, and every step feeds that into the next.
CURVES = {"float32": 1e-4, "bfloat16": 1e-2}
MARGIN = 3.0  # times the PyTorch program's own rounding


class Measured(Protocol):
    """What one program makes of one batch; see compare.Pass."""

    @property
    def logits(self) -> Mapping[int, np.ndarray]: ...
    @property
    def losses(self) -> np.ndarray: ...
    @property
    def gradients(self) -> Mapping[str, np.ndarray]: ...
    @property
    def bpb(self) -> Mapping[int, float]: ...
    @property
    def validation(self) -> Mapping[int, np.ndarray]: ...
    @property
    def val_bytes(self) -> float: ...


@dataclass(frozen=True)
class Row:
    """One comparison. `jax` and `torch` are the values where they are single numbers.

    `jax_error` and `torch_error` are the distances from a run that tells how much is rounding:
    float64 for the single pass; for training see curve_rows.
    """

    name: str
    unit: str
    difference: float
    tolerance: float
    jax_error: float
    torch_error: float
    jax: float | None = None
    torch: float | None = None

    @property
    def passed(self) -> bool:
        return bool(self.difference <= self.tolerance)  # NaN fails


@dataclass
class Curve:
    """A training run: loss and gradient norm of each step, and how far each weight moved."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    moved: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, loss: float, grad_norm: float) -> None:
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    def distance(self, other: Curve) -> np.ndarray:
        """|difference of the losses| at each step."""
        return np.abs(np.subtract(self.losses, other.losses))


def pass_rows(ours: Measured, theirs: Measured, exact: Measured) -> list[Row]:
    """JAX, PyTorch and PyTorch in float64 on one batch: a row per loop count, loop and tensor."""
    rows = []

    def add(
        name: str,
        unit: str,
        base: float,
        distance: Any,
        values: tuple[Any, Any, Any],
        yardstick: float = 0.0,
    ) -> None:
        a, b, c = values
        single = np.ndim(a) == 0
        rows.append(
            Row(
                name=name,
                unit=unit,
                difference=distance(a, b),
                tolerance=max(base, MARGIN * max(yardstick, distance(b, c))),
                jax_error=distance(a, c),
                torch_error=distance(b, c),
                jax=float(a) if single else None,
                torch=float(b) if single else None,
            )
        )

    for k in exact.logits:
        values = (ours.logits[k], theirs.logits[k], exact.logits[k])
        add(f"logits after {k} loops", "max", LOGITS, largest, values)
    for k, losses in enumerate(zip(ours.losses, theirs.losses, exact.losses, strict=True), start=1):
        means = tuple(of.mean() for of in losses)
        add(f"loss after {k} loops", "nats", LOSSES, largest, means, of_mean(*losses[1:]))
    for name, gradient in exact.gradients.items():
        size = float(np.linalg.norm(gradient))

        def relative(a: np.ndarray, b: np.ndarray, size: float = size) -> float:
            return float(np.linalg.norm(a.astype(np.float64) - b)) / size

        values = (ours.gradients[name], theirs.gradients[name], gradient)
        add(f"gradient of {name}", "relative", GRADIENTS, relative, values)
    for k in exact.bpb:
        numbers = (ours.bpb[k], theirs.bpb[k], exact.bpb[k])
        nats = theirs.validation[k], exact.validation[k]
        bits = of_mean(*nats) * nats[0].size / theirs.val_bytes / np.log(2)
        add(f"bits per byte at {k} loops", "bits", LOSSES, largest, numbers, bits)
    return rows


def of_mean(rounded: np.ndarray, exact: np.ndarray) -> float:
    """How far roundings of so many tokens move their mean, by their own size.

    The distance of the two means would be a lottery: it may be near nothing where all of it is
    rounding, and no other program would then agree.
    """
    errors = np.asarray(rounded, np.float64) - exact
    return float(np.sqrt(np.mean(errors**2) / errors.size))


def largest(a: Any, b: Any) -> float:
    return float(np.max(np.abs(np.asarray(a, np.float64) - b)))


def curve_rows(curves: Mapping[str, Curve]) -> list[Row]:
    """Training losses, largest difference over the steps.

    float32 Newton–Schulz: the yardstick is a PyTorch run whose first weights were moved to the
    neighbouring floats, that is, what rounding alone grows to in so many steps. bfloat16
    Newton–Schulz: each library sums in its own order, so single steps differ by bfloat16 roundings;
    the yardstick is how far each program's bfloat16 run strays from its own float32 run.
    """
    f32, b16 = "float32", "bfloat16"
    yardsticks = {
        f32: (f"jax {f32}", "torch nudged", f"torch {f32}", "torch nudged"),
        b16: (f"jax {b16}", f"jax {f32}", f"torch {b16}", f"torch {f32}"),
    }
    rows = []
    for dtype, (jax_run, jax_base, torch_run, torch_base) in yardsticks.items():
        ours, theirs = curves[jax_run], curves[torch_run]
        own = float(theirs.distance(curves[torch_base]).max())
        rows.append(
            Row(
                name=f"{len(ours.losses)} training losses, {dtype} Newton–Schulz",
                unit="nats, max",
                difference=float(ours.distance(theirs).max()),
                tolerance=max(CURVES[dtype], MARGIN * own),
                jax_error=float(ours.distance(curves[jax_base]).max()),
                torch_error=own,
                jax=ours.losses[-1],
                torch=theirs.losses[-1],
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """The rows side by side, with where the distances in the last columns are measured from."""
    width = max(len(f"{row.name} ({row.unit})") for row in rows)
    head = ("jax", "torch", "|jax−torch|", "tolerance", "jax error", "torch error")
    lines = [" ".join([f"{'':{width}}", *(f"{name:>11}" for name in head)])]
    for row in rows:
        values = (f"{v:.6f}" if v is not None else "" for v in (row.jax, row.torch))
        sizes = (row.difference, row.tolerance, row.jax_error, row.torch_error)
        cells = (*values, *(f"{size:.1e}" for size in sizes))
        label = f"{row.name} ({row.unit})"
        line = " ".join([f"{label:{width}}", *(f"{cell:>11}" for cell in cells)])
        lines.append(f"{line}  {'PASS' if row.passed else 'FAIL'}")
    lines += [
        "Errors are distances from torch in float64; for training in float32, from torch started a",
        "rounding away; for bfloat16 Newton–Schulz, from the same program's float32 run: libraries",
        "sum bfloat16 products in different orders, so these runs part by roundings, not by rules.",
    ]
    return "\n".join(lines)


def tally(rows: list[Row]) -> str:
    """Who is closer to float64 on the single pass, and the verdict over all rows."""
    judged = [row for row in rows if "training" not in row.name]
    closer = sum(row.jax_error < row.torch_error for row in judged)
    failed = [row.name for row in rows if not row.passed]
    verdict = f"FAIL: {len(failed)} of {len(rows)} rows, first {failed[0]}" if failed else "PASS"
    return (
        f"jax is closer to float64 in {closer} of {len(judged)} rows of the single pass\n"
        f"{verdict if failed else f'PASS: all {len(rows)} rows'}"
    )


def draw(rows: list[Row], curves: Mapping[str, Curve], path: Path) -> None:
    """Curves, their differences, and gradient errors; `path` with the endings .png and .svg."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    looks: dict[str, dict[str, Any]] = {
        "torch float32": {"color": "#2a6f97", "linewidth": 4, "alpha": 0.4},
        "jax float32": {"color": "#012a4a", "linewidth": 1.2},
        "torch bfloat16": {"color": "#f4a261", "linewidth": 4, "alpha": 0.4},
        "jax bfloat16": {"color": "#c1121f", "linewidth": 1.2, "linestyle": "--"},
    }
    steps = np.arange(1, len(curves["jax float32"].losses) + 1)
    for name, look in looks.items():
        left.plot(steps, curves[name].losses, label=name, **look)
    left.set(title="training loss, by type of Newton–Schulz", xlabel="step", ylabel="nats")
    pairs = (
        ("jax float32", "torch float32", "#012a4a"),
        ("torch nudged", "torch float32", "#8ecae6"),
        ("jax bfloat16", "torch bfloat16", "#c1121f"),
        ("jax bfloat16", "jax float32", "#e9c46a"),
        ("torch bfloat16", "torch float32", "#f4a261"),
    )
    for a, b, color in pairs:
        gap = np.maximum(curves[a].distance(curves[b]), 1e-8)
        middle.semilogy(steps, gap, label=f"{a} − {b}", color=color, linewidth=1.2)
    middle.set(title="difference of two losses", xlabel="step", ylabel="nats")
    gradients = [row for row in rows if row.name.startswith("gradient")]
    places = np.arange(len(gradients))
    right.semilogy(places, [r.tolerance for r in gradients], "_", color="#555", label="tolerance")
    right.semilogy(places, [r.jax_error for r in gradients], "o", color="#c1121f", label="jax")
    right.semilogy(
        places, [r.torch_error for r in gradients], "o", mfc="none", color="#2a6f97", label="torch"
    )
    right.set(title="gradient error against float64", xlabel="tensor", ylabel="relative")
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        part = path.with_name(f".{path.name}.{ending}.part")
        figure.savefig(part, format=ending, dpi=130)
        os.replace(part, path.with_suffix(f".{ending}"))
    plt.close(figure)
