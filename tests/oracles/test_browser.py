"""A real browser on the pages: the chat of `herd serve`, and the report of `herd show`.

Needs Chromium (`apt install chromium`); skipped where it is not installed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from herdbook.evaluation.report_page import report_page
from tests.evaluation.conftest import made_up  # noqa: F401
from tests.oracles.test_openai_client import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A tab; what its scripts complain of fails the test that asks for it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *OFFLINE])
        tab = browser.new_page()
        yield tab
        browser.close()


def test_a_chat_in_the_browser(page: Any, tiny_folder: Path) -> None:
    """A key is asked for; send, read the answer, begin anew, send again."""
    from playwright.sync_api import expect

    server = Server(str(tiny_folder), key="secret").wait()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        page.goto(server.url)
        page.wait_for_selector(".error")
        assert page.is_visible("#key"), "no key, no models: the page asks for one"
        page.fill("#key", "secret")
        page.dispatch_event("#key", "change")
        expect(page.locator("#model option")).to_have_count(1)
        page.click("#fresh")
        for _ in range(2):
            page.fill("#text", "hello <b>you</b>")
            page.press("#text", "Enter")
            expect(page.locator(".assistant")).to_have_count(1)
            expect(page.locator("#go")).to_have_text(re.compile("^Send"), timeout=60_000)
            assert page.locator(".user").inner_text() == "hello <b>you</b>", "text, not markup"
            assert len(page.locator(".assistant").inner_text()) > 1
            page.click("#fresh")
            assert page.locator("#log > *").count() == 0
        assert not complaints
    finally:
        server.stop()


def test_the_report_is_drawn(page: Any, made_up: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    """Every picture of the report page has a size on the screen, and nothing runs over its width."""
    file = tmp_path / "report.html"
    file.write_text(report_page(made_up), encoding="utf-8")
    page.set_viewport_size({"width": 1000, "height": 800})
    page.goto(file.as_uri())
    boxes = [picture.bounding_box() for picture in page.locator("svg").all()]
    assert boxes and all(box["width"] > 100 and box["height"] > 30 for box in boxes)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1000
