"""The pages: whole, escaped, in two languages, and drawn from what the book holds."""

from __future__ import annotations

import re
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from herdbook.book.book import Artifact, Book
from herdbook.evaluation import charts
from herdbook.evaluation.page import page
from herdbook.evaluation.report_page import report_page

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Checker(HTMLParser):
    """Fails where tags are not closed in order; collects text by language and all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert not checker.open
    return checker


@pytest.mark.parametrize("name", ["base", "data", "tune", "merge", "cria", "report"])
def test_every_page_is_whole_and_self_contained(
    name: str, family: dict[str, Artifact], book: Book
) -> None:
    html = page(family[name], book)
    checker = check(html)
    assert html.startswith("<!doctype html>")
    assert [tag for tag, _ in checker.tags].count("script") == 1, "a reply became a script"
    for _, attributes in checker.tags:
        for key in ("src", "href"):
            assert key not in attributes, "a page loads nothing"
    assert "http" not in re.sub(r"http://www.w3.org\S*", "", html)
    assert family[name].ref in "".join(checker.text)


def test_what_others_wrote_is_shown_and_escaped(family: dict[str, Artifact], book: Book) -> None:
    html = page(family["cria"], book)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script>alert" not in html
    data = page(family["data"], book)
    assert "&lt;b&gt;Luna&lt;/b&gt;" in data and "<b>Luna" not in data


def test_the_pedigree_names_every_ancestor(family: dict[str, Artifact], book: Book) -> None:
    html = page(family["cria"], book)
    drawing = html[html.index('class="pedigree"') :]
    for name in ("cria@1", "merge@1", "smollm2@1", "tune@1", "identity@1", "retention@1"):
        assert f"<b>{name}</b>" in drawing
    assert drawing.count("<b>smollm2@1</b>") == 3  # parent of merge, tune and retention


def test_the_models_page_shows_its_report(family: dict[str, Artifact], book: Book) -> None:
    html = page(family["cria"], book)
    assert "failed: perplexity (zh) rises 4.1 %" in html or "+4.1 %" in html
    assert html.count("<polyline") == 2, "the loss curve"
    assert "4 more" in html and "另外 4 个" in html  # nine questions, five shown
    assert "98.4 MB" in html and "84.1 MB" in html
    # a model without a report still has the curve of the adapter it was merged from
    assert page(family["merge"], book).count("<polyline") == 2
    assert page(family["base"], book).count("<polyline") == 0


def test_every_label_stands_in_both_languages(made_up: dict[str, Any]) -> None:
    html = report_page(made_up)
    english, chinese = html.count('<span lang="en">'), html.count('<span lang="zh">')
    assert english == chinese > 15
    check(html)


def test_charts_are_well_formed_and_true_to_the_figures() -> None:
    curve = charts.loss_curve([(100 * n, 3.0 / (n + 1)) for n in range(30)])
    lines = [one for one in xml.fromstring(curve) if one.tag == "polyline"]
    points = [tuple(map(float, p.split(","))) for p in lines[0].attrib["points"].split()]
    assert len(points) == 30
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(points))
    assert charts.loss_curve([(1, 2.0)]) == ""
    assert charts.loss_curve([(1, float("nan")), (2, 1.0), (3, 0.5)]) != ""
    bars = xml.fromstring(charts.bars(50.0, 100.0, ("50", "<100>")))
    widths = [float(one.attrib["width"]) for one in bars if one.tag == "rect"]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.1)
    change = charts.change(0.05, 0.01, 0.09, 0.03)
    xml.fromstring(change)
    assert 'class="bad"' in change
    assert 'class="good"' in charts.change(0.01, 0.0, 0.02, 0.03)


@pytest.mark.parametrize("high", [0.07, 1.0, 3.7, 12.0, 99.0, 41_000.0])
def test_ticks_are_round_and_cover(high: float) -> None:
    ticks = charts.ticks(0.0, high, 5)
    assert ticks[0] == 0 and ticks[-1] >= high - 1e-9
    assert 3 <= len(ticks) <= 7
