"""The text of a diagnosis: summary sentences, sections with figures, and the numbers as JSON."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from looped_jax.config.registry import LOOP_RULES
from looped_jax.diagnostics import figures
from looped_jax.diagnostics.measure import TokenMeasurements
from looped_jax.diagnostics.weight_statistics import MatrixStatistics
from looped_jax.inference.trained_model import TrainedModel
from looped_jax.plotting.figures import heatmap
from looped_jax.plotting.html_report import Section

INSIDE = {  # what training records with train.diagnostics_every, and how to read it
    "gradient_block": "gradient arriving at the output of each layer",
    "gradient_attention": "gradient arriving at the output of each attention",
    "gradient_mlp": "gradient arriving at the output of each MLP",
    "residual_norm": "norm of the residual stream after each layer, mean over the step's tokens",
}


# ---- sentences -----------------------------------------------------------------------------------


def summary(model: TrainedModel, tokens: TokenMeasurements) -> list[str]:
    """What the numbers say, in a few sentences."""
    nats, trained = tokens.mean(tokens.nats), model.config.model.loops
    best = int(nats.argmin()) + 1
    lines = [
        f"The loss is lowest at {best} loops ({nats[best - 1]:.4f} nats); after the first loop it "
        f"is {nats[0]:.4f}"
        + (
            f", at the trained {trained} loops {nats[trained - 1]:.4f}"
            if trained <= len(nats)
            else ""
        )
        + "."
    ]
    if tokens.loops > 1:
        change, agree = tokens.mean(tokens.change), tokens.mean(tokens.agreement())
        lines.append(
            f"The state moves by {100 * change[0]:.1f}% of its length from loop 1 to 2, and by "
            f"{100 * change[-1]:.1f}% from loop {tokens.loops - 1} to {tokens.loops}."
        )
        lines.append(
            f"Loop 2 changes the likeliest token at {100 * (1 - agree[0]):.1f}% of all positions, "
            f"loop {tokens.loops} at {100 * (1 - agree[-1]):.1f}%."
        )
        settled = tokens.settled()[tokens.counted]
        lines.append(f"{100 * (settled == 1).mean():.1f}% of predictions stay what loop 1 says.")
    if LOOP_RULES[model.config.model.variant].same_start:
        lines.append(
            f"{model.config.model.variant} passes the previous loop on through queries alone: the "
            "first token of a row has one key, so its output cannot depend on the number of loops."
        )
    return lines


def make_sections(
    model: TrainedModel,
    tokens: TokenMeasurements,
    trace: Mapping[str, np.ndarray],
    ids: np.ndarray,
    matrices: dict[str, MatrixStatistics],
    entries: list[dict[str, Any]],
    decode: Callable[[Sequence[int]], str],
) -> list[Section]:
    """The page's sections; `decode` says how tokens read."""
    trained = model.config.model.loops
    words = [decode([i]) or "·" for i in ids.tolist()]
    sections = [
        Section(
            "Loss and accuracy at every loop count",
            "One forward pass contains every smaller model: the state after loop k is what a model "
            "of k loops ends with. The red circle is the trained count. A healthy model improves "
            "up to there; what happens beyond is extrapolation.",
            figures.by_loop(
                {
                    "loss": tokens.mean(tokens.nats),
                    "accuracy": 100 * tokens.mean(tokens.correct()),
                },
                first=1, trained=trained, labels=["nats", "% of tokens"],
            ),
            "loss",
        ),
        Section(
            "Confidence",
            "Entropy of the predicted distribution and probability of its likeliest token. Loops "
            "that refine lower the entropy; confidence that rises while the loss does not fall is "
            "overconfidence.",
            figures.by_loop(
                {
                    "entropy": tokens.mean(tokens.entropy),
                    "top probability": tokens.mean(tokens.confidence),
                },
                first=1, trained=trained, labels=["nats", ""],
            ),
            "confidence",
        ),
    ]  # fmt: skip
    if tokens.loops > 1:
        sections += [
            Section(
                "How far the state moves",
                "Each point compares a loop's normalised state with that of the loop before: the "
                "cosine of the two, and the length of their difference over the earlier one's. A "
                "loop that approaches a fixed point moves less and less.",
                figures.by_loop(
                    {
                        "cosine with the loop before": tokens.mean(tokens.cosine),
                        "relative change": tokens.mean(tokens.change),
                    },
                    first=2, trained=trained, labels=["", ""],
                ),
                "movement",
            ),
            Section(
                "How much predictions change",
                "KL divergence from the prediction before to the one after each loop, and the "
                "share of tokens whose likeliest token stays the same.",
                figures.by_loop(
                    {
                        "KL divergence": tokens.mean(tokens.kl),
                        "same likeliest token": 100 * tokens.mean(tokens.agreement()),
                    },
                    first=2, trained=trained, labels=["nats", "% of tokens"],
                ),
                "agreement",
            ),
            Section(
                "When predictions settle",
                "Left: the loop in which a token's prediction changes for the last time; loop 1 "
                "means never. Right: the accuracy of these predictions after the first loop and at "
                "the end; the gap is the gain from the later loops.",
                figures.settling(tokens),
                "settling",
            ),
            Section(
                "Tokens that still change late",
                "Validated positions whose prediction changed in the latest loops: "
                "what stood before, what came next, and the prediction after each loop.",
                table=late_table(tokens, decode),
            ),
        ]  # fmt: skip
    sections += [
        Section(
            "Loss along the row",
            "Later positions have more context and should be easier. Lines that part only late "
            "show that loops need context to work with.",
            figures.loss_by_position(tokens),
            "positions",
        ),
        Section(
            "The residual stream, loop by loop and layer by layer",
            "Mean norm of the residual stream after every layer, on the text of the next figure. "
            "LT carries the stream on from loop to loop, FLT and LT_ia start each loop from the "
            "embedding. A norm that climbs from loop to loop is a warning, though no collapse by "
            "itself.",
            heatmap(
                np.linalg.norm(np.asarray(trace["block"], np.float32), axis=-1)
                .mean((2, 3))
                .tolist(),
                title="norm of the residual stream",
            ),
            "streams",
        ),
        Section(
            "Attention",
            "Attention of up to six loops and six heads on "
            f"{decode(ids.tolist())!r}: queries down, keys across, brighter is more. Rows of one "
            "column differ only by the loop.",
            figures.attention(np.asarray(trace["weights"])[:, :, 0], words),
            "attention",
        ),
        Section(
            "Weights: entries",
            "Histogram of each kind of weight, one line per layer (dark first), counts on a log "
            "scale. Outliers far from the bulk, or a layer unlike the others, deserve attention.",
            figures.histograms(matrices),
            "histograms",
        ),
        Section(
            "Weights: spectra",
            "Largest singular value, and effective rank (exp of the entropy of the normalised "
            "singular values). The same matrices act in every loop, so a large norm acts K times.",
            figures.spectra(matrices),
            "spectra",
        ),
    ]
    if entries:
        sections.append(
            Section(
                "How it was trained",
                "The run's own log. A gradient norm that varies strongly often precedes a rise of "
                "the loss.",
                figures.curves(entries),
                "training_curves",
            )
        )
    for entry in [e for e in entries if "diagnostics/gradient_block" in e][-1:]:
        sections.append(
            Section(
                f"Inside training step {entry['step']}",
                "Recorded because train.diagnostics_every was set. "
                + " ".join(f"{name.replace('_', ' ')}: {how}." for name, how in INSIDE.items()),
                figures.inside(entry, list(INSIDE)),
                "inside",
            )
        )
    return sections


def late_table(
    tokens: TokenMeasurements, decode: Callable[[Sequence[int]], str], count: int = 12
) -> str:
    """HTML rows of the tokens that settled last, at most one per row of text."""
    settled = np.where(tokens.counted, tokens.settled(), 0)
    settled[:, :4] = 0  # too little context to show
    positions = settled.argmax(axis=1)
    rows = np.argsort(-settled[np.arange(len(settled)), positions], kind="stable")[:count]
    head = "".join(f"<th>{k + 1}</th>" for k in range(tokens.loops))
    lines = [f"<table><tr><th>before</th><th>next</th>{head}</tr>"]
    for row in rows:
        position = positions[row]
        if settled[row, position] < 2:
            continue
        target = int(tokens.last_targets[row, position])
        before = decode(tokens.inputs[row, max(0, position - 12) : position + 1].tolist())
        cells = []
        correct = tokens.correct()[:, row, position]
        for prediction, hit in zip(
            tokens.prediction[:, row, position].tolist(), correct, strict=True
        ):
            right = " class='right'" if hit else ""
            cells.append(f"<td{right}>{_code(decode([prediction]))}</td>")
        lines.append(
            f"<tr><td>{_code(before[-40:])}</td><td>{_code(decode([target]))}</td>{''.join(cells)}</tr>"
        )
    lines.append("</table><p class='small'>Green: the token that came.</p>")
    return "\n".join(lines) if len(lines) > 2 else "<p>No prediction changed after loop 1.</p>"


def _code(text: str) -> str:
    shown = text.replace("\n", "⏎").replace("\t", "⇥") or "·"
    return f"<code>{html.escape(shown)}</code>"


def numbers(
    tokens: TokenMeasurements,
    trace: Mapping[str, np.ndarray],
    matrices: dict[str, MatrixStatistics],
) -> dict[str, Any]:
    """Every number that is drawn, ready for JSON."""
    settled = tokens.settled()[tokens.counted]
    by_loop = {
        "loss": tokens.nats, "entropy": tokens.entropy, "top_probability": tokens.confidence,
        "accuracy": tokens.correct(), "kl": tokens.kl, "agreement": tokens.agreement(),
        "cosine": tokens.cosine, "relative_change": tokens.change,
    }  # fmt: skip
    return {
        "loops": tokens.loops,
        "tokens": int(tokens.counted.sum()),
        **{name: tokens.mean(values).tolist() for name, values in by_loop.items()},
        "loss_by_position": tokens.by_position(tokens.nats).tolist(),
        "settled_in_loop": [float((settled == k).mean()) for k in range(1, tokens.loops + 1)],
        "residual_norm": np.linalg.norm(np.asarray(trace["block"], np.float32), axis=-1)
        .mean((2, 3))
        .tolist(),
        "weights": {
            name: {
                "rms": m.rms,
                "spectral_norm": m.spectral_norm,
                "effective_rank": m.effective_rank,
            }
            for name, m in matrices.items()
        },
    }
