"""Pages that come from the code say what the code says."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import make
import network_page
import pytest

from clustersim.spec.schema import TABLES as SCENARIO_TABLES
from clustersim.spec.schema import json_schema, meanings

DOCS = Path(__file__).resolve().parent.parent / "docs"


PAGES: dict[str, str] = make.pages()


@pytest.mark.parametrize("page", PAGES)
def test_a_printed_page_is_current(page: str) -> None:
    path = DOCS / page
    assert path.is_file() and path.read_text("utf-8") == PAGES[page], (
        f"docs/{page} is stale; run: python docs/make.py"
    )


def test_every_command_has_a_page_and_every_page_a_command() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in (DOCS / "commands").glob("*.md")}
    assert pages == {page for page in PAGES if page.startswith("commands/")}


def test_a_refreshed_excerpt_has_new_numbers_in_old_places() -> None:
    shown = "tiny  1 s\n…\nstep  1 ms  2 ms\n\n  7 others  1\n"
    printed = "tiny  2 s\nfirst  9\nstep  3 ms  4 ms\n  5 others  6\nlast\n"
    assert make.refreshed(shown, printed) == "tiny  2 s\n…\nstep  3 ms  4 ms\n\n  5 others  6\n"


def test_an_excerpt_of_something_no_longer_printed_is_refused() -> None:
    with pytest.raises(SystemExit, match="no longer printed"):
        make.refreshed("gone  1\n", "tiny  2 s\n")


@pytest.mark.parametrize("name", SCENARIO_TABLES)
def test_every_key_of_a_scenario_says_what_it_is(name: str) -> None:
    value = SCENARIO_TABLES[name]
    assert set(meanings(value)) == set(value.model_fields) - {"family"}


def test_every_table_of_a_scenario_has_its_place_in_the_page() -> None:
    assert set(make.PLACES) == set(SCENARIO_TABLES)


def test_editors_show_what_a_key_means() -> None:
    fidelity = json_schema()["$defs"]["Network"]["properties"]["fidelity"]
    assert fidelity["description"].startswith("port_bound: closed form")


def test_the_plot_of_speed_shows_every_row_and_says_what_it_shows() -> None:
    drawn = ElementTree.fromstring(PAGES["network-speed.svg"])
    shown = {part.attrib["id"] for part in drawn if "id" in part.attrib}
    assert drawn.attrib["role"] == "img" and shown == set(drawn.attrib["aria-labelledby"].split())
    rows = json.loads(network_page.DATA.read_text("utf-8"))["scaling"]["rows"]
    dots = [part for part in drawn.iter() if part.tag.endswith("circle")]
    assert len(dots) == sum(len(one) for one in rows.values())


def test_the_measured_cost_of_an_exchange_grows_no_faster_than_f_log_f_over_all_sizes() -> None:
    exponents = json.loads(network_page.DATA.read_text("utf-8"))["scaling"]["exponents"]
    assert all(one["all"] <= 1 for one in exponents.values())


def test_the_links_judged_for_an_exchange_grow_no_faster_than_its_flows() -> None:
    rows = json.loads(network_page.DATA.read_text("utf-8"))["scaling"]["rows"]
    for one in rows.values():
        shares = [row["judged"] / row["flows"] for row in one if row["gpus"] >= 64]
        assert shares == sorted(shares, reverse=True)
