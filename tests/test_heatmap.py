"""Tables of numbers as drawings."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from clustersim.report.heatmap import Cell, Heatmap, heatmap_svg

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*values: float | None, better: bool = False, words: str = "1") -> ElementTree.Element:
    cells = [Cell(value, words, f"about {words}", mark=n == 0) for n, value in enumerate(values)]
    heatmap = Heatmap(
        title=f"title {words}",
        about=f"told {words}",
        x="columns, s",
        y="rows, GB",
        columns=[f"{words} {n}" for n in range(len(values))],
        rows=[words],
        cells=[cells],
        value="step / balanced",
        larger_is_better=better,
    )
    return ElementTree.fromstring(heatmap_svg(heatmap))


def fills(root: ElementTree.Element) -> list[tuple[int, int, int]]:
    """Colours of the cells."""
    rects = [group.find(f"{SVG}rect") for group in root.iter(f"{SVG}g")]
    words = [rect.attrib["fill"].lstrip("#") for rect in rects if rect is not None]
    return [(int(word[:2], 16), int(word[2:4], 16), int(word[4:], 16)) for word in words]


def test_it_says_what_it_is_to_those_who_cannot_see_it() -> None:
    root = drawn(1.0, 2.0)
    assert root.attrib["role"] == "img"
    shown = {part.attrib["id"] for part in root if "id" in part.attrib}
    assert shown == set(root.attrib["aria-labelledby"].split())
    titles = [group.find(f"{SVG}title") for group in root.iter(f"{SVG}g")]
    assert len(titles) == 2 and all(title is not None and title.text for title in titles)


def test_axes_and_scale_have_their_units() -> None:
    texts = [part.text for part in drawn(1.0, 2.0).iter(f"{SVG}text")]
    assert {"columns, s", "rows, GB", "step / balanced"} <= set(texts)


def test_words_from_files_cannot_become_markup_or_scripts() -> None:
    words = '<script>alert(1)</script> & "x" \x1b[31m'
    root = drawn(1.0, words=words)
    assert not list(root.iter(f"{SVG}script"))
    texts = [part.text or "" for part in root.iter(f"{SVG}text")]
    assert any('<script>alert(1)</script> & "x" \\x1b[31m' in text for text in texts)


@pytest.mark.parametrize(("better", "red"), [(False, 1), (True, 0)])
def test_worse_is_red_and_better_is_blue(better: bool, red: int) -> None:
    colours = fills(drawn(0.5, 2.0, better=better))
    assert colours[red][0] > colours[red][2] and colours[1 - red][0] < colours[1 - red][2]


def test_the_middle_is_neutral_and_what_is_missing_is_grey() -> None:
    middle, missing, _ = fills(drawn(1.0, None, 3.0))
    assert len(set(middle)) == 1 and len(set(missing)) == 1 and middle != missing


def test_a_map_of_one_value_or_none_or_zero_is_drawn() -> None:
    assert len(fills(drawn(1.0))) == len(fills(drawn(None))) == len(fills(drawn(0.0))) == 1


def test_a_marked_cell_has_a_frame_and_others_have_none() -> None:
    marks = [group.findall(f"{SVG}rect[@class='mark']") for group in drawn(1.0, 2.0).iter(f"{SVG}g")]
    assert [len(mark) for mark in marks] == [1, 0]


def test_the_scale_runs_from_the_smallest_to_the_largest_value_there_is() -> None:
    texts = [part.text for part in drawn(1.0, 4.0).iter(f"{SVG}text")]
    assert "4" in texts and "0.25" not in texts


def test_it_can_be_read_on_a_dark_screen() -> None:
    (style,) = drawn(1.0, 2.0).iter(f"{SVG}style")
    assert "prefers-color-scheme:dark" in (style.text or "")
