"""One self-contained HTML page out of figures, tables, plots and videos.

Styles are inline and pictures and films are data URIs, so the page is a single file that opens
from disk, needs no network and can be sent by mail. It has no scripts.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
from collections.abc import Sequence
from html import escape
from pathlib import Path

_STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #ffffff; --ground: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--ground); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .25rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: 0 0 .75rem; }
.soft, figcaption, .detail, footer { color: var(--soft); }
.soft { overflow-wrap: anywhere; }
.tiles { display: grid; gap: .75rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.tile, figure, .table { background: var(--paper); border: 1px solid var(--line);
  border-radius: .5rem; padding: .75rem .9rem; }
.tile { display: flex; flex-direction: column; }
.label { font-size: .85rem; color: var(--soft); }
.value { font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums;
  line-height: 1.25; }
.detail { font-size: .82rem; }
.items { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.clips { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); }
.wide { grid-column: 1 / -1; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .88rem; margin-top: .5rem; }
img, video { display: block; width: 100%; height: auto; border-radius: .25rem; }
.pixels { image-rendering: pixelated; }
.table { overflow-x: auto; min-width: 0; background: /* a shadow where there is more to scroll */
  linear-gradient(to right, var(--paper) 2rem, transparent) local,
  linear-gradient(to left, var(--paper) 2rem, transparent) local,
  linear-gradient(to right, #0003, transparent .8rem),
  linear-gradient(to left, #0003, transparent .8rem), var(--paper); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
footer { margin-top: 2.5rem; font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 30rem) { table { font-size: .85rem; } th, td { padding: .3rem .35rem; } }
@media print { .tile, figure, .table { break-inside: avoid; } body { background: #fff; } }
"""


@dataclasses.dataclass(frozen=True)
class Number:
    """A headline number: "Return, mean" / "931.4" / "± 24.1 over 20 episodes"."""

    label: str
    value: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture: PNG bytes with a title, a caption, and words for who can't see it."""

    title: str
    png: bytes
    caption: str = ""
    alt: str = ""
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Video:
    """A film: MP4 bytes with a title, a caption and a PNG shown until it plays."""

    title: str
    mp4: bytes
    caption: str = ""
    poster: bytes | None = None
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; the first column names the row, the others hold numbers as text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, a line of text and the items below it."""

    title: str
    items: Sequence[Plot | Video | Table]
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """All that goes on the page, from top to bottom. Texts are plain, not HTML."""

    title: str
    subtitle: str
    numbers: Sequence[Number]
    sections: Sequence[Section]
    footer: str = ""


def render_report(report: Report) -> str:
    """Renders the page.

    Args:
        report: what to show.

    Returns:
        The HTML text.

    Raises:
        ValueError: if a row of a table has not as many cells as the table has columns.
    """
    tiles = "".join(_number(number) for number in report.numbers)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body><main>",
        f'<header><h1>{escape(report.title)}</h1><p class="soft">{escape(report.subtitle)}</p>',
        "</header>",
        f'<div class="tiles">{tiles}</div>' if tiles else "",
        *(_section(section) for section in report.sections),
        f"<footer>{escape(report.footer)}</footer>" if report.footer else "",
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def write_report(path: Path, report: Report) -> Path:
    """Writes the page to a file.

    Args:
        path: the file to write; its folder is made if need be.
        report: what to show.

    Returns:
        `path`.

    Raises:
        ValueError: see `render_report`.
    """
    text = render_report(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _number(number: Number) -> str:
    detail = f'<span class="detail">{escape(number.detail)}</span>' if number.detail else ""
    return (
        f'<div class="tile"><span class="label">{escape(number.label)}</span>'
        f'<span class="value">{escape(number.value)}</span>{detail}</div>'
    )


def _section(section: Section) -> str:
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    items = ""
    for clips, group in itertools.groupby(section.items, _is_clip):
        html = "\n".join(_item(item) for item in group)
        items += f'<div class="clips wide">{html}</div>' if clips else html
    return (
        f"<section><h2>{escape(section.title)}</h2>{text}\n"
        f'<div class="items">{items}</div></section>'
    )


def _is_clip(item: Plot | Video | Table) -> bool:
    """Tells whether an item shares its line with the videos beside it."""
    return isinstance(item, Video) and not item.wide


def _item(item: Plot | Video | Table) -> str:
    if isinstance(item, Table):
        return _table(item)
    kind = ' class="wide"' if item.wide else ""
    caption = f"<figcaption>{escape(item.caption)}</figcaption>" if item.caption else ""
    media = _plot(item) if isinstance(item, Plot) else _video(item)
    return f"<figure{kind}><h3>{escape(item.title)}</h3>{media}{caption}</figure>"


def _plot(plot: Plot) -> str:
    return f'<img src="{_data_uri(plot.png, "image/png")}" alt="{escape(plot.alt or plot.title)}">'


def _video(video: Video) -> str:
    poster = f' poster="{_data_uri(video.poster, "image/png")}"' if video.poster else ""
    return (
        '<video class="pixels" controls muted loop playsinline preload="metadata" '
        f'aria-label="{escape(video.title)}"{poster} '
        f'src="{_data_uri(video.mp4, "video/mp4")}"></video>'
    )


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(
                f"table {table.title!r}: got a row of {len(row)} cells, {list(row)}; must have "
                f"{len(table.columns)}, one per column."
            )
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return (
        f'<div class="table{" wide" if table.wide else ""}"><h3>{escape(table.title)}</h3>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
