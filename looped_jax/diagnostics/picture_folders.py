"""Two folders of pictures: attention of every loop, layer and head, and every weight's entries.

A large model has thousands. Of attention then come all layers and heads of some loops, the first
and the last among them, while there is room for that; of weights some, from the first to the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from looped_jax.diagnostics import figures
from looped_jax.diagnostics.weight_statistics import MatrixStatistics
from looped_jax.plotting import figure_files
from looped_jax.plotting.figure_files import Flipbook

ATTENTION, WEIGHTS = "attention_heatmaps", "weight_distributions"


def write_attention(folder: Path, weights: np.ndarray, words: Sequence[str], *, most: int) -> str:
    """Write `most` heatmaps at most into <folder>/attention_heatmaps; what was written, in words.

    Earlier ones are removed. weights: [K, L, H, T, T] of one row, whose tokens read as `words`
    """
    folder = _emptied(folder / ATTENTION, "attn_*.png")
    loops, layers, heads = weights.shape[:3]
    chosen = _shown(loops, layers, heads, most)
    if chosen:
        book = Flipbook(figures.attention_heatmap(weights[0, 0, 0], words, title="loop"))
    for loop, layer, head in chosen:
        title = f"loop {loop + 1}, layer {layer + 1}, head {head + 1}"
        name = f"attn_loop{loop + 1}_layer{layer + 1}_head{head + 1}.png"
        book.save(weights[loop, layer, head], title, folder / name)
    told = _told(folder, len(chosen), loops * layers * heads)
    of_loops = sorted({loop + 1 for loop, _, _ in chosen})
    return told + (f"; loops {', '.join(map(str, of_loops))}" if 0 < len(of_loops) < loops else "")


def write_weights(folder: Path, matrices: Mapping[str, MatrixStatistics], *, most: int) -> str:
    """Likewise histograms of matrices and tables, `most` at most, into weight_distributions."""
    folder = _emptied(folder / WEIGHTS, "weights_*.png")
    names = [name for name, found in matrices.items() if found.dimensions > 1]
    chosen = [names[i] for i in _spread(len(names), most)]
    for name in chosen:
        figure = figures.weight_histogram(name, matrices[name])
        figure_files.save_picture(figure, folder / f"weights_{name}.png")
    return _told(folder, len(chosen), len(names))


def _emptied(folder: Path, pattern: str) -> Path:
    for earlier in folder.glob(pattern):
        earlier.unlink()
    return folder


def _told(folder: Path, written: int, total: int) -> str:
    more = f", all with --pictures={total}" if written < total else ""
    return f"{folder}: {written} of {total} pictures{more}"


def _shown(loops: int, layers: int, heads: int, most: int) -> list[tuple[int, int, int]]:
    """Indices (loop, layer, head) of the pictures of attention."""
    places = [(layer, head) for layer in range(layers) for head in range(heads)]
    if most < len(places):
        return [(loops - 1, *places[i]) for i in _spread(len(places), most)]
    return [(k, *place) for k in _spread(loops, most // len(places)) for place in places]


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, even: the last, and with two or more the first."""
    if most < 2:
        return [count - 1][:most]
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
