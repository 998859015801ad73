"""The report as a reader opens it: in Chromium, on a phone and on a desk; skipped where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config
from test_report import CURVES, OF_IMAGES, images, line, save_checkpoints, statistics_of

from pera_fast import report
from pera_fast.data.sources import scan
from pera_fast.evaluate import untrained_backbone

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"
)

WIDTHS = {"phone": 390, "desk": 1280}
LEAST_FONT_PX = 14
# What a reader would stumble over, as one sentence each.
LOOK = """
(leastFontPx) => {
    const faults = [], root = document.documentElement;
    if (root.scrollWidth > window.screen.width) faults.push(`page is ${root.scrollWidth} px wide`);
    for (const image of document.images) {
        if (!image.complete || image.naturalWidth === 0) faults.push(`image not shown: ${image.alt}`);
        if (!image.alt.trim()) faults.push("image without alternative text");
        if (image.getBoundingClientRect().width < 60) faults.push(`image too small: ${image.alt}`);
    }
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode.textContent.trim();
        const size = parseFloat(getComputedStyle(texts.currentNode.parentElement).fontSize);
        if (text && size < leastFontPx) faults.push(`${size} px: ${text}`);
    }
    let level = 0;
    for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
        const own = Number(heading.tagName[1]);
        if (own > level + 1) faults.push(`heading out of order: ${heading.textContent}`);
        level = own;
    }
    if (document.querySelectorAll("h1").length !== 1) faults.push("not one h1");
    if (!root.lang) faults.push("no language");
    if (!document.title) faults.push("no title");
    return faults;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=CHROMIUM, args=["--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section, and with names that are long and odd."""
    run = tmp_path_factory.mktemp("run_with_a_name_that_no_line_can_hold_" + "x" * 80)
    first, *_ = images(run / "images", 13, "uint16")
    Path(first.path).rename(run / "images" / f"S2A_MSIL2A_20260101T000000_N0511_R008_{'T' * 60}.tif")
    scenes = scan(run / "images").scenes
    config = tiny_config(seed=3)
    model, data = replace(config.model, in_bands=13), replace(config.data, data=str(run / "images"))
    config = replace(config, model=model, data=data)
    statistics = statistics_of(scenes, 13)
    lines = [
        json.dumps(line(step, lr=1e-5 / step, knn_top1=0.5)) for step in range(100_000, 2_000_000, 100_000)
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    save_checkpoints(run, config, statistics, *range(100_000, 600_000, 100_000))
    return report.write_report(
        run, backbone=untrained_backbone(config), config=config, statistics=statistics, scenes=scenes
    )


def faults(browser: Any, file: Path, screen: str) -> list[str]:
    """What is wrong with a page: what the browser says, what it asks for, and what LOOK finds."""
    found: list[str] = []
    size = {"width": WIDTHS[screen], "height": 844}
    context = browser.new_context(viewport=size, screen=size, is_mobile=screen == "phone")
    page = context.new_page()
    page.on("console", lambda said: found.append(f"console {said.type}: {said.text}"))
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri(), wait_until="load")
    found += page.evaluate(LOOK, LEAST_FONT_PX)
    context.close()
    return found + [
        f"asks for {url}" for url in asked if url != file.as_uri() and not url.startswith("data:")
    ]


@pytest.mark.parametrize("screen", WIDTHS)
def test_page_is_clean_and_readable(browser: Any, page_file: Path, screen: str) -> None:
    assert faults(browser, page_file, screen) == []


def test_page_has_every_section_filled(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    for name in (*CURVES, *OF_IMAGES):
        assert page.locator(f"section#{name} h2").is_visible()
        assert page.locator(f"section#{name} img").count() > 0 or name == "summary", name
    page.close()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ('<div style="width: 1500px">x</div>', "px wide"),
        (f"<p>{'x' * 300}</p>", "px wide"),
        ('<img alt="torn" src="data:image/png;base64,AAAA">', "image not shown: torn"),
        ('<img src="data:image/png;base64,AAAA">', "image without alternative text"),
        ('<img alt="dot" width="9" src="data:image/png;base64,AAAA">', "image too small: dot"),
        ('<p style="font-size: 10px">small print</p>', "10 px: small print"),
        ("<h4>deep</h4>", "heading out of order: deep"),
        ("<script>console.error('no')</script>", "console error: no"),
        ("<script>undefined_name()</script>", "error: undefined_name is not defined"),
        ('<link rel="stylesheet" href="other.css">', "asks for file:"),
        ('<img alt="away" src="http://127.0.0.1:9/x.png">', "asks for http://127.0.0.1:9/x.png"),
    ],
)
def test_faults_are_found(browser: Any, tmp_path: Path, broken: str, said: str) -> None:
    """The look above is one that can fail."""
    file = tmp_path / "page.html"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>t</title>'
    file.write_text(
        f'<!DOCTYPE html><html lang="en"><head>{head}</head><body><h1>h</h1>{broken}</body></html>'
    )
    found = faults(browser, file, "phone")
    assert any(said in fault for fault in found), found
    file.write_text(f'<!DOCTYPE html><html lang="en"><head>{head}</head><body><h1>h</h1></body></html>')
    assert faults(browser, file, "phone") == []
