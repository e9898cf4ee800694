"""An HTML page that needs no other file: text, tables and figures in a single file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from looped_jax import files
from looped_jax.plotting import figure_files

STYLE = """
body { font: 16px/1.5 Georgia, serif; color: #1b1b1b; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2 { font-family: Helvetica, Arial, sans-serif; font-weight: 600; line-height: 1.2; }
h2 { margin-top: 2.6rem; border-top: 1px solid #ddd; padding-top: 1.4rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figcaption, .small { color: #555; font-size: 0.9rem; }
ul.summary { background: #f4f7fa; padding: 1rem 1rem 1rem 2.2rem; border-radius: 6px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; }
td, th { padding: 0.2rem 0.6rem; border-bottom: 1px solid #e5e5e5; text-align: left; }
td code { white-space: pre; background: #f4f4f4; padding: 0 0.2rem; }
.right { background: #d8f0dd; }
.collapsed td { color: #a4161a; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph on how to read it, and a figure or a table (trusted HTML)."""

    title: str
    reading: str
    figure: Figure | None = None
    name: str = ""  # of the figure's files
    table: str = ""


def write(
    folder: Path, title: str, about: str, summary: Sequence[str], sections: Sequence[Section]
) -> Path:
    """Write <folder>/index.html and the files of every figure; the page's path."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1><p class='small'>{html.escape(about)}</p>",
        "<ul class='summary'>" + "".join(f"<li>{html.escape(s)}</li>" for s in summary) + "</ul>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.reading)}</p>")
        if section.figure is not None:
            data = base64.b64encode(figure_files.save(section.figure, folder / section.name))
            alt = html.escape(section.title, quote=True)
            parts.append(
                f"<figure><img alt='{alt}' src='data:image/png;base64,{data.decode()}'><figcaption>"
                f"{section.name}: .{', .'.join((*figure_files.ENDINGS, 'csv'))}</figcaption>"
                "</figure>"
            )
        if section.table:
            parts.append(f"<div class='table'>{section.table}</div>")
    parts.append("</body></html>\n")
    path = folder / "index.html"
    files.write_text(path, "\n".join(parts))
    return path
