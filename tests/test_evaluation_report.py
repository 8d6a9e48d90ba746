"""Tests of rllib_dreamer.evaluation.report and rllib_dreamer.evaluation.plots."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from rllib_dreamer.evaluation import plots, reconstruction, report, statistics, videos

VOID = {"meta", "img", "br", "link", "input"}


class Outline(HTMLParser):
    """Collects tags with their attributes and text, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of each occurrence of a tag."""
        return [attributes for name, attributes in self.tags if name == tag]


def example() -> report.Report:
    """A page with one item of each kind."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    summary = statistics.summarize([1.0, 2.0, 4.0], resamples=10)
    png = plots.to_png(plots.plot_returns([1.0, 2.0, 4.0], summary))
    film = report.Video("Best", videos.encode_mp4(frames), "caption", videos.poster_png(frames[0]))
    table = report.Table("Returns", ["", "mean"], [["<greedy> & co", "2.3"]])
    return report.Report(
        title='dmc/walker-walk "v1" <b>',
        subtitle="runs/walker",
        numbers=[report.Number("Return", "2.3", "± 1.2")],
        sections=[report.Section("Episodes", [report.Plot("Returns", png), film, table], "text")],
        footer="made by rllib_dreamer",
    )


def test_page_is_balanced_and_holds_every_part(tmp_path: Path) -> None:
    path = report.write_report(tmp_path / "new" / "report.html", example())
    page = Outline(path.read_text(encoding="utf-8"))
    assert [len(page.all(tag)) for tag in ("img", "video", "table", "section", "footer")] == [1] * 5
    words = " ".join(page.words)
    for text in ("2.3", "± 1.2", "Best", "caption", "made by rllib_dreamer", "<greedy> & co"):
        assert text in words
    assert not page.all("b")  # texts are escaped
    viewport = [meta for meta in page.all("meta") if meta.get("name") == "viewport"]
    assert viewport[0]["content"] == "width=device-width, initial-scale=1"


def test_what_is_wide_shrinks_or_scrolls_by_itself() -> None:
    """On a narrow screen nothing moves the whole page."""
    text = report.render_report(example())
    rules = re.sub(r"\s+", " ", text[text.index("<style>") : text.index("</style>")])
    assert re.search(r"} img, video {[^}]* width: 100%;", rules)
    assert re.search(r"} \.table { overflow-x: auto; min-width: 0;", rules)
    boxes = re.findall(r'<div class="table(?: wide)?"><h3>[^<]*</h3><table>', text)
    assert len(boxes) == text.count("<table") == 1


def test_page_needs_nothing_from_outside() -> None:
    text = report.render_report(example())
    page = Outline(text)
    assert not page.all("script") and not page.all("link")
    sources = [
        value for _, attrs in page.tags for k, value in attrs.items() if k in ("src", "poster")
    ]
    assert len(sources) == 3
    kinds = [re.match(r"data:([a-z0-9/]+);base64,", source or "") for source in sources]
    assert [kind and kind[1] for kind in kinds] == ["image/png", "image/png", "video/mp4"]
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert "url(" not in text


def test_media_come_back_byte_for_byte() -> None:
    page = example()
    outline = Outline(report.render_report(page))
    source = outline.all("video")[0]["src"] or ""
    film = page.sections[0].items[1]
    assert isinstance(film, report.Video)
    assert base64.b64decode(source.partition(",")[2]) == film.mp4
    assert {"controls", "muted", "playsinline"} <= set(outline.all("video")[0])
    assert outline.all("img")[0]["alt"] == "Returns"


def test_optional_parts_leave_nothing_behind() -> None:
    page = report.Report("title", "subtitle", [], [])
    outline = Outline(report.render_report(page))
    assert not outline.all("footer") and not outline.all("section")
    assert all("tiles" not in (attrs.get("class") or "") for attrs in outline.all("div"))


def test_wide_items_span_the_page() -> None:
    items = [report.Plot("p", b"x", wide=True), report.Table("t", ["a"], [["1"]], wide=True)]
    outline = Outline(report.render_report(report.Report("", "", [], [report.Section("", items)])))
    assert outline.all("figure")[0]["class"] == "wide"
    assert "table wide" in [attrs.get("class") for attrs in outline.all("div")]


def test_videos_side_by_side_share_a_line() -> None:
    film = report.Video("film", b"x")
    items = [report.Plot("p", b"x"), film, film, report.Video("grid", b"x", wide=True), film]
    outline = Outline(report.render_report(report.Report("", "", [], [report.Section("", items)])))
    clips = [attrs for attrs in outline.all("div") if attrs.get("class") == "clips wide"]
    assert len(clips) == 2  # two films, then the wide one by itself, then one film
    assert len(outline.all("video")) == 4


def test_table_with_a_short_row_is_refused() -> None:
    table = report.Table("Returns", ["", "mean"], [["greedy"]])
    page = report.Report("title", "", [], [report.Section("s", [table])])
    with pytest.raises(ValueError, match=r"table 'Returns': got a row of 1 cells"):
        report.render_report(page)


def test_open_loop_plot_shows_context_and_steps_ahead() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((3, 8, 16, 16, 3))
    model = np.clip(truth + rng.normal(0, 0.1, truth.shape), 0, 1)
    quality = reconstruction.open_loop_quality(model, truth, context=5)
    figure = plots.plot_open_loop(quality, "psnr", baseline=quality)
    observed, imagined, still = figure.axes[0].lines[:3]
    np.testing.assert_array_equal(observed.get_xdata(), [-4, -3, -2, -1, 0])
    np.testing.assert_array_equal(imagined.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(imagined.get_ydata(), quality.ahead.psnr)
    assert still.get_label() == "last frame held"
    image = matplotlib.image.imread(io.BytesIO(plots.to_png(figure, dpi=50)), format="png")
    assert image.shape[:2] == (170, 250)
    with pytest.raises(ValueError, match="metric: got 'lpips'"):
        plots.plot_open_loop(quality, "lpips")


def test_return_and_reward_plots_hold_the_data() -> None:
    summary = statistics.summarize([3.0, 1.0, 2.0], resamples=10)
    points = plots.plot_returns([3.0, 1.0, 2.0], summary).axes[0].lines[1]
    np.testing.assert_array_equal(points.get_ydata(), [1.0, 2.0, 3.0])
    traces = {f"episode {i}": np.full(4, float(i)) for i in range(8)}
    lines = plots.plot_reward_traces(traces).axes[0].lines
    assert [line.get_label() for line in lines] == list(traces)
    np.testing.assert_array_equal(lines[7].get_ydata(), traces["episode 7"])
