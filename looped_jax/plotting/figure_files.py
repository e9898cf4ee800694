"""A figure as files: pictures for pages, papers and slides, and the numbers that it shows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.image import imsave

from looped_jax import files

ENDINGS = ("png", "svg", "pdf")
NUMBERS = ("panel", "series", "x", "y", "value")


def save(figure: Figure, path: Path) -> bytes:
    """Write `path` with each of ENDINGS, and what is drawn as .csv; the bytes of the PNG.

    `path` has no ending of its own. The layout is computed once, so that all show the same.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    pictures = {}
    for ending in ENDINGS:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, dpi=110)
        pictures[ending] = buffer.getvalue()
        files.write_bytes(path.with_name(f"{path.name}.{ending}"), pictures[ending])
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([NUMBERS, *numbers(figure)])
    files.write_text(path.with_name(f"{path.name}.csv"), table.getvalue())
    return pictures["png"]


def save_picture(figure: Figure, path: Path) -> None:
    """Write a PNG alone, as one of a folder of them."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    files.write_bytes(path, buffer.getvalue())


class Flipbook:
    """Many pictures of one heatmap, whose labels, drawn once, take longer than what changes.

    figure: its first axes hold the image, its title is as long as any other
    """

    def __init__(self, figure: Figure):
        self._canvas, self._axes = FigureCanvasAgg(figure), figure.axes[0]
        self._image = self._axes.images[0]
        self._changing = [self._image, *self._axes.spines.values(), self._axes.title]
        for artist in self._changing:
            artist.set_animated(True)
        self._canvas.draw()
        self._labels = self._canvas.copy_from_bbox(figure.bbox)

    def save(self, values: np.ndarray, title: str, path: Path) -> None:
        """Write a PNG of the heatmap of `values`."""
        self._image.set_data(values)
        self._axes.title.set_text(title)
        self._canvas.restore_region(self._labels)
        for artist in self._changing:
            self._axes.draw_artist(artist)
        buffer = io.BytesIO()
        imsave(buffer, np.asarray(self._canvas.buffer_rgba()), format="png")
        files.write_bytes(path, buffer.getvalue())


def numbers(figure: Figure) -> Iterator[tuple[str, str, str, str, str]]:
    """Everything that lines, bars and heatmaps of a figure show, a row of NUMBERS each.

    panel: the axes' label if they were given one, else their title, y label or number; series: its
    label, which may begin with "_" to be in no legend; value: of a heatmap, x its column, y its row
    """
    for number, axes in enumerate(figure.axes, 1):
        label = str(axes.get_label())
        if axes.get_visible() and label != "<colorbar>":
            panel = label or axes.get_title() or axes.get_ylabel() or str(number)
            for series, x, y, value in _of(axes):
                shown = "" if value is None else f"{value:.8g}"
                yield panel, series, f"{x:.8g}", f"{y:.8g}", shown


def _of(axes: Axes) -> Iterator[tuple[str, float, float, float | None]]:
    for number, line in enumerate(axes.lines, 1):
        name = _name(line.get_label(), f"line {number}")
        xs, ys = (np.asarray(values, float) for values in line.get_data(orig=False))
        for x, y in zip(xs, ys, strict=True):
            yield name, x, y, None
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    for number, container in enumerate(bars, 1):
        name = _name(container.get_label(), f"bars {number}")
        for bar in container:
            middle = (bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2)
            along = container.orientation == "horizontal"
            x, y = (bar.get_width(), middle[1]) if along else (middle[0], bar.get_height())
            yield _name(bar.get_label(), name), x, y, None
    for number, image in enumerate(axes.images, 1):
        name = _name(image.get_label(), f"image {number}")
        for (row, column), value in np.ndenumerate(np.asarray(image.get_array())):
            yield name, column, row, value


def _name(label: object, otherwise: str) -> str:
    """A label without its "_"; what matplotlib numbered or named itself, as "_child0", is none."""
    text = str(label)
    made_up = text.startswith(("_child", "_nolegend_", "_container"))
    return otherwise if made_up or not text else text.removeprefix("_")
