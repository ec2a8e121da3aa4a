"""`clustersim report`: what the page holds, what it says of what is missing, and that it harms nobody."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies
from hypothesis.extra.numpy import arrays
from inspected import opened, saved, small
from scenarios import rail_tree, tiny

from clustersim.analysis.latency import numbers, samples
from clustersim.analysis.over_time import GpuUse
from clustersim.analysis.utilization import STATES
from clustersim.cli import _status
from clustersim.errors import ClustersimError, ResultError
from clustersim.report.html import packed
from clustersim.report.html_content import Content, Load, OneStep
from clustersim.report.html_parts import Missing
from clustersim.report.html_plots import cumulative
from clustersim.report.html_report import report_page
from clustersim.report.html_theme import MARK, THEMES
from clustersim.study.inspecting import Opened, open_result
from clustersim.study.reporting import _taken_together, content_of, write_report
from clustersim.trace.record import Text, Trace

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[0m'\"&"


class Page(HTMLParser):
    """Tags with their attributes, the text of scripts, and all other text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words = ""
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    claimed = {"total_tokens_per_second": 1e6, "tpot": "1 ms", "source": "a document"}
    faults = [{"kind": "slow_gpu", "gpu": 1, "factor": 2.0}]
    return opened(tmp_path_factory.mktemp("report"), small(claimed=claimed, faults=faults))


@pytest.fixture(scope="module")
def content(result: Opened) -> Content:
    return content_of(result)


@pytest.fixture(scope="module")
def html(content: Content) -> str:
    return report_page(content)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


# ---- what it holds --------------------------------------------------------------------------------


def test_the_same_result_gives_the_same_bytes(result: Opened, html: str) -> None:
    again = open_result(str(result.folder))
    assert report_page(content_of(again)) == html


def test_nothing_is_loaded_and_only_the_pages_own_scripts_may_run(html: str, page: Page) -> None:
    addresses = [a[key] for _, a in page.tags for key in ("src", "href", "action", "data") if key in a]
    assert addresses and all(address is not None and address.startswith("#") for address in addresses)
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    allowed = next(part for part in policy.split(";") if "script-src" in part)
    hashes = [f"'sha256-{b64encode(sha256(s.encode()).digest()).decode()}'" for s in page.scripts[1:]]
    assert allowed.split() == ["script-src", *hashes]


def test_every_link_within_the_page_leads_somewhere(page: Page) -> None:
    known = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    names = [a["id"] for _, a in page.tags if "id" in a]
    assert len(names) == len(known)
    assert {(a["href"] or "")[1:] for a in page.of("a")} <= known


def test_every_figure_says_what_it_shows_and_has_its_numbers_in_a_table(html: str, page: Page) -> None:
    figures = page.data["figures"]
    assert {"latencies", "causes", "timeline", "what-if", "gpu-map", "link-use", "expert-map"} <= {
        figure["name"] for figure in figures
    }
    for figure in figures:
        inside = html.split(f'<figure id="{figure["name"]}">')[1].split("</figure>")[0]
        caption = inside.split("<figcaption>")[1].split("</figcaption>")[0]
        assert len(caption.split()) > 8 and caption in inside.split('aria-label="')[1:][-1] + inside
        assert "<tbody><tr>" in inside
        assert 'role="img"' in inside


def test_every_axis_has_a_title_that_names_its_unit(page: Page) -> None:
    counted = {"rank", "expert", "layer", "busiest rank ÷ mean"}
    for figure in page.data["figures"]:
        for axis in ("xaxis", "yaxis"):
            one = figure["layout"][axis]
            if one.get("type") != "category":
                title = one["title"]["text"]
                assert title in counted or title.endswith(")"), (figure["name"], title)


def test_the_plotting_library_takes_every_figure_in_every_theme(page: Page) -> None:
    from plotly.graph_objects import Figure

    for figure in page.data["figures"]:
        for theme in THEMES.values():
            data = [{k: v for k, v in t.items() if k not in ("packed", "labels")} for t in figure["data"]]
            drawn = {"data": painted(data, theme), "layout": painted(figure["layout"], theme)}
            assert MARK not in json.dumps(drawn)
            Figure(drawn)


def painted(value: Any, theme: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return theme[value.removeprefix(MARK)] if value.startswith(MARK) else value
    if isinstance(value, list):
        return [painted(one, theme) for one in value]
    if isinstance(value, dict):
        return {key: painted(one, theme) for key, one in value.items()}
    return value


def test_claims_stand_beside_what_was_found(page: Page, content: Content) -> None:
    assert "claimed 1,000,000" in page.words
    assert "Claimed by: a document" in page.words
    found = content.summary["claimed"]["tpot"]["ratio"]
    assert f"{found:.3g} x" in page.words


def test_faults_and_the_whole_scenario_are_told(page: Page, content: Content) -> None:
    assert "slow gpu" in page.words
    for line in content.scenario.splitlines():
        assert line in page.words


def test_the_slow_gpu_is_named_as_the_cause(content: Content, page: Page) -> None:
    assert not isinstance(content.shares, Missing)
    assert content.shares["mean"]["by"]["slow_gpu"] > 0
    assert "straggler: slow GPU" in json.dumps(page.data["figures"])


def test_the_drawn_step_is_the_slowest_and_its_path_fills_the_latency(
    content: Content, result: Opened, page: Page
) -> None:
    step, took = content.step, samples(result.trace)["step"]
    assert isinstance(step, OneStep)
    assert step.path.number == int(np.argmax(took))
    figure = next(one for one in page.data["figures"] if one["name"] == "timeline")
    on_path = [t for t in figure["data"] if t["y"][0] == "critical path"]
    drawn = sum(sum(trace["x"]) for trace in on_path)
    assert drawn == pytest.approx(figure["layout"]["xaxis"]["range"][1], rel=1e-3)


def test_a_timeline_shows_the_ranks_asked_for_in_the_step_asked_for(result: Opened) -> None:
    step = content_of(result, 1, ["2", "0"]).step
    assert isinstance(step, OneStep)
    assert (step.path.number, list(step.ranks)) == (1, [2, 0])
    assert {piece["rank"] for piece in step.pieces} == {0, 2}


def only(result: Opened, rows: np.ndarray) -> Opened:
    """The result as if only these of its spans had been recorded."""
    spans = {
        name: Text(column.codes[rows], column.words) if isinstance(column, Text) else column[rows]
        for name, column in result.trace.tables["spans"].items()
    }
    return replace(result, trace=Trace({**result.trace.tables, "spans": spans}, result.trace.facts))


# ---- what is missing ------------------------------------------------------------------------------


def test_a_result_of_sums_alone_says_what_is_missing_and_how_to_record_it(tmp_path: Path) -> None:
    found = Page(report_page(content_of(opened(tmp_path, small("sums")))))
    assert found.words.count("trace.level") >= 3
    names = {figure["name"] for figure in found.data["figures"]}
    assert {"latencies", "operators-decode", "link-use", "expert-map"} <= names
    assert not {"timeline", "gpu-map"} & names


def test_a_model_without_experts_has_none_to_show(tmp_path: Path) -> None:
    dense = {"experts": 0, "top_k": 0, "ffn": 0, "dense_ffn": 512}
    alone = {"tensor_parallel": 2, "data_parallel": 2, "expert_parallel": 1}
    scenario = tiny(rail_tree(2, 2), model=dense, deployment=alone)
    found = Page(report_page(content_of(opened(tmp_path, scenario))))
    assert "No expert was at work" in found.words
    assert "expert-map" not in {figure["name"] for figure in found.data["figures"]}


def test_of_a_part_of_a_run_the_rest_is_unknown_and_not_idle(tmp_path: Path) -> None:
    whole = opened(tmp_path, small(workload={"decode_steps": 4}))
    content = content_of(only(whole, numbers(whole.trace.tables["spans"], "token_batch") == 1))
    assert isinstance(content.step, OneStep) and content.step.path.number == 1
    assert isinstance(content.load, Load)
    shares = content.load.uses["whole run"].shares
    assert np.isnan(shares).any() and not np.isnan(shares).all()
    found = Page(report_page(content))
    data = found.data
    assert "What is empty was not recorded." in found.words
    trace = next(one for one in data["figures"] if one["name"] == "gpu-map")["data"][0]["packed"]
    assert 255 in b64decode(trace["bytes"])


def test_a_damaged_table_is_an_error_and_not_something_missing(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    table = folder / "trace" / "spans.parquet"
    whole = bytearray(table.read_bytes())
    whole[4 : len(whole) // 2] = bytes(len(whole) // 2 - 4)
    table.write_bytes(whole)
    with pytest.raises(ResultError, match=r"spans\.parquet: damaged"):
        write_report(open_result(str(folder)))
    assert not (folder / "report.html").exists()


def test_of_steps_that_were_cut_short_in_the_recording_none_is_drawn(tmp_path: Path) -> None:
    whole = opened(tmp_path, small(workload={"microbatches": 2, "decode_steps": 2}))
    first = only(whole, numbers(whole.trace.tables["spans"], "token_batch") % 2 == 0)
    assert isinstance(content_of(first).step, Missing)


def test_a_result_of_an_older_version_has_a_report_that_says_what_it_lacks() -> None:
    stored = Path(__file__).parent / "stored" / "v3"
    found = Page(report_page(content_of(open_result(str(stored)))))
    assert "What links carried over time is not in this result" in found.words
    assert {"timeline", "gpu-map", "causes"} <= {figure["name"] for figure in found.data["figures"]}


# ---- words from files -----------------------------------------------------------------------------


def with_evil_names(result: Opened) -> Opened:
    """The result with names, places and operators that would do something if they were let."""

    def spelled(column: Any) -> Any:
        return Text(column.codes, tuple(f"{word}{EVIL}" for word in column.words))

    evil = {("ranks", "gpu"), ("links", "source"), ("links", "target"), ("links", "tier")}
    evil |= {("prices", "operator"), ("prices", "kernel"), ("prices", "basis"), ("faults", "place")}
    tables = {
        table: {
            name: spelled(column) if (table, name) in evil else column for name, column in columns.items()
        }
        for table, columns in result.trace.tables.items()
    }

    def renamed(value: Any, key: str = "") -> Any:
        if isinstance(value, str) and key not in ("bound_by", "kind", "stream", "operator", "origin"):
            return value + EVIL
        if isinstance(value, dict):
            return {(k + EVIL if key == "tiers" else k): renamed(v, k) for k, v in value.items()}
        return [renamed(one, key) for one in value] if isinstance(value, list) else value

    facts = {**result.trace.facts, "gpu_model": EVIL}
    scenario = f"description = {json.dumps(EVIL)}\nname = {json.dumps(EVIL)}\n"
    return replace(
        result, summary=renamed(dict(result.summary)), scenario_text=scenario, trace=Trace(tables, facts)
    )


def test_words_from_files_stay_words(result: Opened, page: Page) -> None:
    found = Page(report_page(content_of(with_evil_names(result))))
    assert found.words.count("<script>alert(1)</script><img src=x onerror=alert(2)>\\x1b[0m'\"&") > 20
    assert [tag for tag, _ in found.tags if tag in ("script", "img")] == ["script"] * 3
    assert not any(key.startswith("on") for _, attributes in found.tags for key in attributes)
    assert found.scripts[1:] == page.scripts[1:]
    # In plots, whose texts may hold tags, they are written as what they are.
    drawn = json.dumps(found.data["figures"])
    assert "&lt;script&gt;" in drawn and "<script" not in drawn and "<img" not in drawn


# ---- the command ----------------------------------------------------------------------------------


@pytest.fixture
def place(result: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a result of its own, in which the command runs; the result's folder."""
    monkeypatch.chdir(tmp_path)
    return saved(tmp_path / "results")


def call(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = _status(["report", *arguments])
    out, err = capfd.readouterr()
    return status, out, err


def test_the_report_of_the_newest_result_lies_beside_it(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = call(capfd)
    page = place / "report.html"
    assert status == 0 and str(page.relative_to(place.parent.parent)) in out
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert page.read_text("utf-8").endswith("</html>\n")
    assert open_result(None).folder.name == place.name


def test_a_report_replaces_a_report(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert [call(capfd, place.name, "-o", "page.html", *step)[0] for step in ((), ("--step", "1"))] == [0, 0]
    assert "Step 1" in Path("page.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--step", "99"), "there is no step 99"),
        (("--gpu", "77"), "there is no rank 77"),
        (("-o", "results"), "is a folder"),
        (("-o", "nowhere/page.html"), "there is no folder nowhere"),
        (("-o", "notes.txt"), "is not replaced"),
        (("tinny",), "did you mean"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    place: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    Path("notes.txt").write_text("mine", encoding="utf-8")
    before = sorted(map(str, Path().rglob("*")))
    status, out, err = call(capfd, *arguments)
    assert (status, out) == (2, "") and said in err and "Traceback" not in err
    assert sorted(map(str, Path().rglob("*"))) == before
    assert Path("notes.txt").read_text("utf-8") == "mine"


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    result: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "page.html"
    place.write_text("<!doctype html>old", encoding="utf-8")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ResultError, match="No space left"):
        write_report(result, place)
    assert place.read_text("utf-8") == "<!doctype html>old"
    assert list(tmp_path.iterdir()) == [place]


def test_a_step_of_which_nothing_was_recorded_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    result = opened(tmp_path, small("sums"))
    with pytest.raises(ClustersimError, match=r"trace\.level"):
        content_of(result, step=0)


# ---- what is made smaller -------------------------------------------------------------------------


@given(
    arrays(
        float,
        strategies.tuples(strategies.integers(1, 5), strategies.integers(1, 7)),
        elements=strategies.floats(0, 50),
    )
)
def test_a_byte_a_cell_keeps_values_to_a_five_hundredth_of_the_scale(values: np.ndarray) -> None:
    made = packed(values, 50.0)
    cells = np.frombuffer(b64decode(made["bytes"]), np.uint8).reshape(made["rows"], made["columns"])
    assert np.abs(cells * made["full"] / made["steps"] - values).max() <= 50.0 / 500 + 1e-9
    assert (cells <= made["steps"]).all()


@given(
    arrays(float, strategies.integers(1, 3000), elements=strategies.floats(0, 1e3)),
    strategies.integers(0, 2**32 - 1),
)
def test_a_distribution_of_fewer_points_is_the_same_to_a_part_in_some_hundred(
    values: np.ndarray, seed: int
) -> None:
    weights = np.random.default_rng(seed).integers(1, 100, len(values))
    at, share = cumulative(values, weights)
    assert len(at) <= 605
    assert (at[0], at[-1]) == (values.min(), values.max())
    assert share[0] == 0 and share[-1] == pytest.approx(1)
    assert (np.diff(at) >= 0).all() and (np.diff(share) > 0).all()
    # Points that are kept are true: so many of the weights are at most these.
    last = np.append(np.diff(at) > 0, True)
    for x, said in zip(at[last], share[last], strict=True):
        if len(values) <= 600:
            assert said == pytest.approx(weights[values <= x].sum() / weights.sum())
        else:
            assert said <= weights[values <= x].sum() / weights.sum() + 1e-9


def test_many_ranks_are_taken_together_as_means() -> None:
    shares = np.random.default_rng(0).random((7, 3, len(STATES)))
    found = _taken_together(GpuUse(np.arange(4.0), shares), 3).shares
    assert found.shape == (3, 3, len(STATES))
    assert np.allclose(found[0], shares[:3].mean(axis=0)) and np.allclose(found[2], shares[6])


def test_a_page_of_1024_busy_gpus_stays_below_8_megabytes(content: Content) -> None:
    rng = np.random.default_rng(0)
    uses = {
        name: GpuUse(np.linspace(0, 1, 147), rng.random((1024, 146, len(STATES))))
        for name in ("whole run", "step 1")
    }
    load = Load(uses, [f"rank {n} (server{n // 8}/gpu{n % 8})" for n in range(1024)], 1, [])
    assert len(report_page(replace(content, load=load)).encode()) < 8e6


def test_cells_of_all_maps_of_a_report_are_bounded(content: Content) -> None:
    assert isinstance(content.load, Load)
    assert sum(use.shares[:, :, 0].size for use in content.load.uses.values()) <= 300_000
    assert all(use.shares.shape[1] <= 500 for use in content.load.uses.values())


# ---- colours --------------------------------------------------------------------------------------


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255


def linear(colour: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return found


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    bright = sorted(float(linear(rgb(c)) @ (0.2126, 0.7152, 0.0722)) + 0.05 for c in (one, other))
    return bright[1] / bright[0]


def lab(colour: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65, of linear RGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ colour
    f = np.cbrt(np.maximum(xyz / (0.9505, 1.0, 1.089), 0.008856))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


#: Source  Machado, Oliveira, Fernandes, IEEE TVCG 15(6), 2009: matrices for a wholly missing cone.
SEEN_BY: dict[str, Any] = {
    "all cones": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


THEME = pytest.mark.parametrize("theme", list(THEMES.values()), ids=list(THEMES))


@THEME
def test_text_is_dark_on_light_or_light_on_dark_enough(theme: Mapping[str, str]) -> None:
    for paper in ("paper", "panel"):
        assert contrast(theme["ink"], theme[paper]) >= 7
        assert contrast(theme["muted"], theme[paper]) >= 4.5
        assert contrast(theme["link"], theme[paper]) >= 4.5


@THEME
@pytest.mark.parametrize("eyes", SEEN_BY)
def test_states_of_gpus_are_told_apart_by_all_eyes(theme: Mapping[str, str], eyes: str) -> None:
    seen = [lab(np.clip(SEEN_BY[eyes] @ linear(rgb(theme[s])), 0, 1)) for s in (*STATES, "paper")]
    apart = [np.linalg.norm(a - b) for n, a in enumerate(seen) for b in seen[:n]]
    assert min(apart) > 12


def test_themes_have_the_same_colours() -> None:
    first, *others = (list(theme) for theme in THEMES.values())
    assert all(names == first for names in others)
