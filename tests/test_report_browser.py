"""The page of `clustersim report` in a browser: it is drawn, can be moved, and asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inspected import opened, small
from pictures import pixels, share_near
from test_report import with_evil_names

from clustersim.report.html_report import report_page
from clustersim.report.html_theme import THEMES
from clustersim.study.inspecting import Opened
from clustersim.study.reporting import content_of, write_report

#: As the page says when all figures are there.
DRAWN = "html[data-drawn=all]"
#: Milliseconds that drawing may take on a machine with much else to do.
PATIENCE = 120_000


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    faults = [{"kind": "slow_gpu", "gpu": 1, "factor": 2.0}]
    return opened(tmp_path_factory.mktemp("browser"), small(workload={"decode_steps": 4}, faults=faults))


@pytest.fixture(scope="module")
def written(result: Opened) -> Path:
    return write_report(result)


class Seen:
    """A page in the browser, and all that it said or asked for."""

    def __init__(self, browser: Any, path: Path, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(PATIENCE)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(DRAWN, state="attached")

    def figure(self, name: str) -> Any:
        return self.page.locator(f"figure#{name}")

    def picture(self, name: str) -> np.ndarray:
        return pixels(self.page.locator(f"#{name}-plot").screenshot())

    def ticks(self, name: str) -> list[str]:
        """In any order: ticks that stay are kept, and others come behind them."""
        return sorted(self.page.locator(f"#{name}-plot .xtick text").all_text_contents())

    def quiet(self) -> bool:
        """Whether it asked for nothing but itself and pictures that it holds, and said nothing."""
        others = [url for url in self.asked[1:] if not url.startswith(("data:", "blob:"))]
        return not others and not self.said


@pytest.fixture(params=["light", "dark"])
def seen(request: pytest.FixtureRequest, browser: Any, written: Path) -> Iterator[Seen]:
    found = Seen(browser, written, request.param)
    yield found
    assert found.quiet(), (found.said, found.asked)
    found.page.close()


def test_all_figures_are_drawn_in_the_colours_of_the_theme(
    seen: Seen, request: pytest.FixtureRequest
) -> None:
    theme = THEMES["dark" if "dark" in request.node.name else "light"]
    plots = seen.page.locator(".plot")
    drawn = seen.page.locator(".plot:has(.main-svg .xtick)")
    assert plots.count() >= 9 and drawn.count() == plots.count()
    timeline = seen.picture("timeline")
    assert share_near(timeline, theme["paper"]) > 0.2
    assert share_near(timeline, theme["compute"]) > 0.02
    assert share_near(timeline, theme["wait"]) > 0.002
    assert share_near(timeline, theme["slow_gpu"]) > 0.002
    # Rank 1 computes most of the time, which the scale ends on.
    assert share_near(seen.picture("gpu-map"), theme["compute_deep"], 40) > 0.02
    assert share_near(pixels(seen.page.screenshot()), theme["paper"]) > 0.4


def test_a_label_appears_over_a_bar_and_over_a_cell(seen: Seen) -> None:
    for name, words in (("gpu-map", "% computing"), ("operators-decode", "dispatch")):
        box = seen.page.locator(f"#{name}-plot .nsewdrag").first
        box.scroll_into_view_if_needed()
        size = box.bounding_box()
        # The longest bar is the first.
        box.hover(position={"x": size["width"] * 0.3, "y": 14})
        label = seen.page.locator(f"#{name}-plot .hovertext")
        label.first.wait_for()
        assert words in label.first.text_content()


def test_time_is_zoomed_by_buttons_and_by_dragging_and_shown_whole_again(seen: Seen) -> None:
    for name in ("timeline", "gpu-map", "link-use"):
        whole = seen.ticks(name)
        buttons = seen.figure(name).locator("button[data-zoom]")
        seen.figure(name).locator("button[data-zoom=in]").press("Enter")
        zoomed = seen.ticks(name)
        assert zoomed != whole and buttons.count() == 5
        seen.figure(name).locator("button[data-zoom=right]").click()
        assert seen.ticks(name) != zoomed
        seen.figure(name).locator("button[data-zoom=all]").click()
        assert seen.ticks(name) == whole
        box = seen.page.locator(f"#{name}-plot .nsewdrag").first
        box.scroll_into_view_if_needed()
        size = box.bounding_box()
        middle = size["y"] + size["height"] / 2
        seen.page.mouse.move(size["x"] + size["width"] * 0.4, middle)
        seen.page.mouse.down()
        seen.page.mouse.move(size["x"] + size["width"] * 0.6, middle, steps=5)
        seen.page.mouse.up()
        seen.page.wait_for_timeout(400)
        assert seen.ticks(name) != whole


def test_another_state_is_shown_when_it_is_chosen_by_keys(seen: Seen, request: pytest.FixtureRequest) -> None:
    theme = THEMES["dark" if "dark" in request.node.name else "light"]
    before = seen.picture("gpu-map")
    seen.figure("gpu-map").get_by_role("radio", name="computing").focus()
    seen.page.keyboard.press("ArrowRight")
    seen.page.keyboard.press("ArrowRight")
    assert seen.figure("gpu-map").get_by_role("radio", name="waiting for others").is_checked()
    after = seen.picture("gpu-map")
    assert share_near(after, theme["wait_deep"], 40) > share_near(before, theme["wait_deep"], 40) + 0.02


def test_the_theme_follows_the_reader(browser: Any, written: Path) -> None:
    seen = Seen(browser, written, "light")
    seen.page.emulate_media(color_scheme="dark")
    seen.page.wait_for_timeout(1500)
    assert share_near(seen.picture("causes"), THEMES["dark"]["paper"]) > 0.3
    assert seen.quiet()
    seen.page.close()


def test_on_paper_all_is_light_as_wide_as_the_sheet_and_the_scenario_whole(
    browser: Any, written: Path
) -> None:
    seen = Seen(browser, written, "dark")
    seen.page.emulate_media(media="print")
    seen.page.wait_for_timeout(1500)
    assert share_near(seen.picture("causes"), THEMES["light"]["paper"]) > 0.3
    widths = {plot.get_attribute("width") for plot in seen.page.locator(".plot .main-svg").all()}
    assert widths == {"680"}
    scenario = seen.page.locator("pre")
    # All of its lines, not a window on them.
    assert scenario.bounding_box()["height"] > 100 * 10
    assert not seen.page.locator("button[data-zoom=in]").first.is_visible()
    assert seen.page.pdf(format="A4").startswith(b"%PDF")
    assert seen.quiet()
    seen.page.close()


def test_names_that_are_scripts_are_only_shown(browser: Any, result: Opened, tmp_path: Path) -> None:
    path = tmp_path / "evil.html"
    path.write_text(report_page(content_of(with_evil_names(result))), encoding="utf-8")
    seen = Seen(browser, path)
    seen.page.wait_for_timeout(300)
    assert seen.quiet(), (seen.said, seen.asked)
    assert "<script>alert(1)</script>" in seen.page.locator("h1").text_content()
    # Also where the plotting library would follow tags.
    assert "<img src=x" in " ".join(seen.page.locator("#timeline-plot .ytick text").all_text_contents())
    assert not seen.page.locator("img, .plot a").count()
    seen.page.close()


def test_without_scripts_the_numbers_are_there(browser: Any, written: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(written.as_uri())
    assert page.get_by_text("tokens of", exact=False).count()
    figures = page.locator("figure")
    assert page.locator("figure:has(figcaption):has(tbody th)").count() == figures.count() > 9
    assert "Figures are drawn by a script" in page.locator("noscript").text_content()
    context.close()
