"""A figure's files: pictures, and a CSV of what is drawn."""

import csv

import numpy as np

from looped_jax.plotting import figure_files, figures


def drawn():
    figure, axes = figures.panels(2, 2)
    (lines, bars), (heat, hidden) = axes
    lines.plot([1, 2], [3.0, np.nan], label="loss")
    lines.plot([5], [6], "o", label="_kept out of the legend")
    lines.plot([7], [8])
    figures.tidy(lines, title="curves")
    bars.barh([0, 1], [10, 20], label=["_a", "_b"])
    bars.bar([4], [0.5])
    bars.set_label("bars of both kinds")
    figures.draw_heatmap(heat, [[1.0, 2.0], [3.0, 400.0]], title="norms")
    hidden.plot([1], [1])
    hidden.set_visible(False)
    return figure


def test_the_numbers_are_what_is_drawn():
    assert list(figure_files.numbers(drawn())) == [
        ("curves", "loss", "1", "3", ""),
        ("curves", "loss", "2", "nan", ""),
        ("curves", "kept out of the legend", "5", "6", ""),
        ("curves", "line 3", "7", "8", ""),
        ("bars of both kinds", "a", "10", "0", ""),
        ("bars of both kinds", "b", "20", "1", ""),
        ("bars of both kinds", "bars 2", "4", "0.5", ""),
        ("norms", "image 1", "0", "0", "1"),
        ("norms", "image 1", "1", "0", "2"),
        ("norms", "image 1", "0", "1", "3"),
        ("norms", "image 1", "1", "1", "400"),
    ]


def test_all_files_are_written_beside_each_other(tmp_path):
    png = figure_files.save(drawn(), tmp_path / "new" / "K=1.5")  # no ending is taken off
    found = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert found.keys() == {f"K=1.5.{ending}" for ending in ("png", "svg", "pdf", "csv")}
    assert found["K=1.5.png"] == png and png.startswith(b"\x89PNG")
    assert b"<svg" in found["K=1.5.svg"] and found["K=1.5.pdf"].startswith(b"%PDF")
    lines = list(csv.reader(found["K=1.5.csv"].decode().splitlines()))
    assert lines[0] == list(figure_files.NUMBERS) and len(lines) == 12


def test_no_two_colours_are_the_same():
    for count in (1, 10, 11, 20, 21, 60):
        assert len({tuple(color) for color in figures.distinct(count)}) == count
