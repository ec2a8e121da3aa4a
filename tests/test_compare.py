"""Results side by side: what they differ by, whether that is noise, and causes that add up to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inspected import small
from scenarios import parallel

from clustersim.analysis.compare import METRICS, difference, differs
from clustersim.analysis.compare_schema import _DIFFERENCE, _INTERVAL, COMPARED, REPLICATED, compare_page
from clustersim.cli import main
from clustersim.errors import ClustersimError, ResultError
from clustersim.report.compare_page import compare_html
from clustersim.spec.writing import to_toml
from clustersim.study import replications as module
from clustersim.study.cases import Tell
from clustersim.study.compare import broken, compare, parse_bound
from clustersim.study.replications import planned, read_replications, replicate
from clustersim.trace.plain import json_text

DOCS = Path(__file__).parent.parent / "docs"
ZIPF = {"gating": {"skew": "zipf"}, "workload": {"sequences": 64, "decode_steps": 4}}


@contextmanager
def silent(title: str) -> Iterator[Tell]:
    yield lambda done, all_: None


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A pool of processes takes longer to start than these runs take.
    monkeypatch.setattr("clustersim.study.cases.cores", lambda: 1)


def written(name: str, **sections: Any) -> str:
    path = Path(f"{name}.toml")
    path.write_text(to_toml(small(**{"name": name, **ZIPF, **sections})), encoding="utf-8")
    return str(path)


@pytest.fixture
def files() -> tuple[str, str]:
    return written("one"), written("two", deployment=parallel(dp=4))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    found = capsys.readouterr()
    assert exit.value.code == status, found.err
    return found.out, found.err


def parts_of(found: dict[str, Any], side: int = 0, phase: int = 0) -> dict[str, Any]:
    one: dict[str, Any] = found["explained"][side]["phases"][phase]
    return one


# ---- laws -----------------------------------------------------------------------------------------------


def assert_adds_up(one: dict[str, Any]) -> None:
    parts = one["parts"]
    for key in ("a", "b"):
        assert fsum(part[key] for part in parts) == pytest.approx(one[key], abs=1e-12)
    whole = one["difference"]["value"]
    assert fsum(part["difference"]["value"] for part in parts) == pytest.approx(whole, abs=1e-12)
    assert one["b"] - one["a"] == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("level", ["spans", "sums"])
@pytest.mark.parametrize("seeds", [0, 3])
def test_the_causes_add_up_to_the_difference(level: str, seeds: int) -> None:
    names = written("one", trace={"level": level}), written("two", deployment=parallel(dp=4))
    one = parts_of(compare(names, silent, seeds))
    assert one["basis"] == ("critical path" if level == "spans" else "GPU time")
    assert one["difference"]["value"]
    assert_adds_up(one)


def test_what_is_explained_is_the_difference_of_the_mean_step(files: tuple[str, str]) -> None:
    found = compare(files, silent, 3)
    step = next(row for row in found["metrics"] if row["metric"] == "step mean")
    assert parts_of(found)["difference"]["value"] == pytest.approx(step["differences"][0]["value"], abs=1e-12)


@pytest.mark.parametrize("seeds", [0, 3])
def test_a_result_against_itself_differs_by_nothing(files: tuple[str, str], seeds: int) -> None:
    found = compare([files[0]] * 3, silent, seeds)
    assert found["differs"] == []
    for row in found["metrics"]:
        assert [one["value"] for one in row["differences"]] == [0.0, 0.0]
        assert [one["verdict"] for one in row["differences"]] == ["no difference"] * 2
    for side in (0, 1):
        assert all(part["difference"]["value"] == 0 for part in parts_of(found, side)["parts"])


def test_swapped_sides_negate_every_difference(files: tuple[str, str]) -> None:
    there, back = compare(files, silent, 3), compare(files[::-1], silent, 3)
    for one, other in zip(there["metrics"], back["metrics"], strict=True):
        (a,), (b,) = one["differences"], other["differences"]
        assert (a["value"], a["low"], a["high"]) == (-b["value"], -b["high"], -b["low"])
        assert a["verdict"] == b["verdict"]
        assert one["values"] == other["values"][::-1]
    mine, theirs = (
        {part["cause"]: part["difference"]["value"] for part in parts_of(one)["parts"]}
        for one in (there, back)
    )
    assert mine == {cause: -value for cause, value in theirs.items()}
    assert there["differs"] == [{**row, "values": row["values"][::-1]} for row in back["differs"]]


@given(st.lists(st.tuples(st.floats(0.5, 2.0), st.floats(-0.1, 0.1)), min_size=2, max_size=12))
def test_what_pairs_have_in_common_does_not_widen_their_interval(draws: list[tuple[float, float]]) -> None:
    a = {seed: value for seed, (value, _) in enumerate(draws)}
    b = {seed: value + more for seed, (value, more) in enumerate(draws)}
    # Any common offset of a pair, ten times as large as what differs, changes nothing.
    far = difference({s: v + 10 * s for s, v in a.items()}, {s: v + 10 * s for s, v in b.items()})
    near = difference(a, b)
    assert near["pairs"] == len(draws)
    assert far["value"] == pytest.approx(near["value"], abs=1e-9)
    assert far["half_width"] == pytest.approx(near["half_width"], abs=1e-7)


def test_noise_is_told_from_a_difference_as_often_as_the_interval_says() -> None:
    rng = np.random.default_rng(1)

    def verdict(shift: float) -> str:
        common = rng.normal(size=10)
        sides = (common + rng.normal(0.0, 0.1, 10), common + rng.normal(shift, 0.1, 10))
        return str(difference(*(dict(enumerate(side.tolist())) for side in sides))["verdict"])

    assert 0.03 <= np.mean([verdict(0.0) == "more than noise" for _ in range(1000)]) <= 0.07
    assert np.mean([verdict(0.3) == "more than noise" for _ in range(200)]) > 0.95


def test_without_common_seeds_differences_are_no_pairs() -> None:
    found = difference({0: 1.0, 1: 1.1, 2: 0.9}, {3: 2.0, 4: 2.1, 5: 1.9})
    assert found["pairs"] == 0
    assert "Welch" in found["how"]
    assert difference({0: 1.0}, {1: 2.0})["verdict"] == "one seed"


# ---- what is compared -----------------------------------------------------------------------------------


def test_results_and_scenarios_are_the_same_to_compare(files: tuple[str, str]) -> None:
    ran = compare(files, silent)
    again = compare(["one", ran["sides"][1]["where"]], silent)
    for key in ("metrics", "explained", "differs"):
        assert again[key] == ran[key]


def test_a_result_from_before_steps_had_a_warm_up_can_be_compared(files: tuple[str, str]) -> None:
    ran = compare(files, silent)
    path = Path(ran["sides"][0]["where"]) / "summary.json"
    summary = json.loads(path.read_text("utf-8"))
    del summary["phases"]["decode"]["steady"]
    path.write_text(json_text(summary), "utf-8")
    assert compare([side["where"] for side in ran["sides"]], silent)["metrics"] == ran["metrics"]


def test_replications_can_be_named_by_their_folder(files: tuple[str, str]) -> None:
    ran = compare(files, silent, 3)
    assert compare([side["where"] for side in ran["sides"]], silent) == ran
    assert [side["seeds"] for side in ran["sides"]] == [[0, 1, 2]] * 2


def test_keys_that_differ_are_told_with_both_values(files: tuple[str, str]) -> None:
    keys = {one["key"]: one["values"] for one in compare(files, silent)["differs"]}
    assert keys == {"deployment.tensor_parallel": [2, 1], "deployment.data_parallel": [2, 4]}


def test_keys_of_tables_in_lists_and_missing_ones_are_told() -> None:
    a, b = {"faults": [{"gpu": 1, "at": 2}], "x": {}}, {"faults": [], "x": {"y": "z" * 500}}
    keys = {one["key"]: one["values"] for one in differs([a, b])}
    assert keys["faults[0].gpu"] == [1, None]
    assert keys["x.y"][0] is None and len(keys["x.y"][1]) < 200


def test_one_file_can_be_compared_with_itself_under_other_keys(files: tuple[str, str]) -> None:
    found = compare([files[0]], silent, others=["gating.skew=even"])
    assert [one["key"] for one in found["differs"]] == ["gating.skew"]


def test_what_is_not_comparable_is_said_and_not_compared() -> None:
    names = (
        written("decode"),
        written("prefill", workload={"phase": "prefill", "sequences": 8}),
        written("other", model={"name": "wider", "hidden": 128}),
    )
    found = compare(names, silent)
    rows = {row["metric"]: row["differences"] for row in found["metrics"]}
    for metric in ("throughput", "step mean", "exposed exchange"):
        assert rows[metric][0]["lacking"] == "A ran decode, B prefill"
        assert "value" in rows[metric][1]
    assert rows["decode step mean"][0]["lacking"] == "B has none"
    assert rows["TTFT mean"][0]["lacking"] == "A has none"
    assert "value" in rows["memory"][0]
    assert found["explained"][0]["phases"] == []
    notes = " ".join(found["notes"])
    assert "A and C serve different models (tiny and wider)" in notes
    assert "A ran decode, B prefill" in notes


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["nothing", "one"], '"nothing" is no result'),
        (["missing.toml", "one.toml"], "missing.toml: there is no such file"),
        (["twoo.toml", "one.toml"], 'did you mean "two.toml"'),
        (["one.toml"], "1 name"),
        (["foreign", "one.toml"], "there is no summary.json in it"),
    ],
)
def test_wrong_names_are_told_before_anything_is_run(
    files: tuple[str, str], names: list[str], said: str
) -> None:
    Path("foreign").mkdir()
    with pytest.raises(ClustersimError, match=re.escape(said)):
        compare(names, silent)
    assert not Path("results").exists()


def test_replications_of_another_version_or_in_part_are_refused(files: tuple[str, str]) -> None:
    folder = planned(files[0], [], None, 2)
    replicate(folder)
    summary = json.loads((folder.folder / "summary.json").read_text("utf-8"))
    (folder.folder / "summaries" / "seed-1.json").unlink()
    with pytest.raises(ResultError, match="not whole"):
        read_replications(folder.folder)
    (folder.folder / "summary.json").write_text(json_text({**summary, "schema_version": 99}), "utf-8")
    with pytest.raises(ResultError, match="version 99"):
        read_replications(folder.folder)


# ---- replications ---------------------------------------------------------------------------------------


def test_replications_have_the_seeds_that_follow_and_differ(files: tuple[str, str]) -> None:
    found = replicate(planned(files[0], [], 5, 3))
    assert found["seeds"] == [5, 6, 7]
    step = found["metrics"]["step mean"]
    assert step["count"] == 3 and step["half_width"] > 0
    assert step["min"] < step["value"] < step["max"]


def test_without_chance_all_replications_are_the_same() -> None:
    found = replicate(planned(written("even", gating={"skew": "even"}), [], None, 3))
    assert all(one["half_width"] == 0 for one in found["metrics"].values())


def test_interrupted_replications_are_kept_and_gone_on_with(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    whole = module.replication

    def interrupted(scenario: Any) -> dict[str, Any]:
        seen.append(scenario.seed)
        if seen == [0, 1]:
            raise KeyboardInterrupt
        return whole(scenario)

    monkeypatch.setattr(module, "replication", interrupted)
    plan = planned(files[0], [], None, 3)
    with pytest.raises(KeyboardInterrupt):
        replicate(plan)
    assert module.done(plan) == 1 and not module.is_replications(plan.folder)
    again = replicate(planned(files[0], [], None, 3))
    assert seen == [0, 1, 1, 2]
    assert again["seeds"] == [0, 1, 2]


def test_a_replication_that_fails_leaves_no_mean(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(scenario: Any) -> dict[str, Any]:
        raise ClustersimError("it cannot end")

    monkeypatch.setattr(module, "replication", failing)
    plan = planned(files[0], [], None, 2)
    with pytest.raises(ClustersimError, match=r"seed 0 failed.*it cannot end"):
        replicate(plan)
    assert not module.is_replications(plan.folder)


def test_a_foreign_folder_is_not_written_to(files: tuple[str, str]) -> None:
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear", "utf-8")
    with pytest.raises(ResultError, match="is not a result"):
        planned(files[0], [], None, 2, Path("mine"))


# ---- bounds ---------------------------------------------------------------------------------------------


def test_bounds_are_held_against_the_ratio_of_every_side_to_the_first(files: tuple[str, str]) -> None:
    found = compare(files, silent)
    row = next(row for row in found["metrics"] if row["metric"] == "step p99")
    ratio = row["differences"][0]["ratio"]
    assert ratio == pytest.approx(row["values"][1]["value"] / row["values"][0]["value"])
    assert broken(found, [f"step p99 > {ratio * 1.01:f}", f"step p99 < {ratio * 0.99:f}"]) == []
    assert len(broken(found, [f"p99 Step>{ratio * 0.99:f}", f"step p99 < {ratio * 1.01:f}"])) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step p99", "is no bound"),
        ("step p98 > 1.05", 'did you mean "step p99"'),
        ("step p99 > 5%", "is no ratio"),
        ("step p99 > -1", "is no ratio"),
        ("step p99 > 0", "is no ratio"),
        ("> 1", "is no bound"),
        ("x" * 1000, "is no bound"),
    ],
)
def test_bounds_that_are_none_say_what_would_be(text: str, said: str) -> None:
    with pytest.raises(ClustersimError, match=re.escape(said)):
        parse_bound(text)


def test_every_metric_can_be_bounded() -> None:
    for name in METRICS:
        assert parse_bound(f"{name} > 1.5") == (name, ">", 1.5)


def test_a_bound_on_what_is_not_there_is_an_error_and_not_kept(files: tuple[str, str]) -> None:
    found = compare(files, silent)
    with pytest.raises(ClustersimError, match="no side has TTFT p99"):
        broken(found, ["TTFT p99 > 2"])


# ---- the commands ---------------------------------------------------------------------------------------


def test_a_broken_bound_ends_with_status_3(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, kept = printed(capsys, "compare", *files, "--fail-if", "step p99 > 1000")
    _, lost = printed(capsys, "compare", *files, "--fail-if", "step p99 > 0.0001", status=3)
    assert "--fail-if" not in kept
    assert "--fail-if: step p99 of B is" in lost
    _, wrong = printed(capsys, "compare", *files, "--fail-if", "step > 1", status=2)
    assert "is not known" in wrong


def test_the_terminal_says_what_differs_and_why(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    said, _ = printed(capsys, "compare", *files, "--seeds", "3")
    for words in ("Side by side", "more than noise", "the parts add up to it", "deployment.data_parallel"):
        assert words in said
    assert "±" in said


def test_one_seed_is_called_exact(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    said, _ = printed(capsys, "compare", *files)
    assert "exact" in said and "±" not in said


def test_run_with_seeds_prints_means_with_intervals_and_leaves_summaries(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    said, _ = printed(capsys, "run", files[0], "--seeds", "3")
    assert "Mean over 3 replications" in said and "±" in said and "MSER-5" in said
    (folder,) = Path("results").glob("one-*-seeds3")
    assert sorted(path.name for path in (folder / "summaries").iterdir()) == [
        f"seed-{seed}.json" for seed in range(3)
    ]
    as_json, _ = printed(capsys, "run", files[0], "--seeds", "3", "--json")
    assert json.loads(as_json) == json.loads((folder / "summary.json").read_text("utf-8"))


class Page(HTMLParser):
    """Tags of a page that are open or of which there is something to say."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.untitled = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_alone_and_escaped(files: tuple[str, str]) -> None:
    found = compare(files, silent, 3)
    found["sides"][0]["name"] = "<script>alert(1)</script>"
    found["differs"].append({"key": "a&b", "values": ["<b>", None]})
    html = compare_html(found)
    page = Page()
    page.feed(html)
    assert page.open == []
    assert "script" not in page.tags and page.references == []
    assert page.tags.count("svg") == html.count("<title>") - 1 > 5
    assert "&lt;script&gt;" in html and "a&amp;b" in html
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_the_page_is_written_where_it_is_asked_for(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, said = printed(capsys, "compare", *files, "-o", "page.html")
    assert "Page: page.html" in said
    assert Path("page.html").read_text("utf-8").startswith("<!DOCTYPE html>")


# ---- what keys mean -------------------------------------------------------------------------------------


def shape(value: Any, place: str = "") -> set[str]:
    """Every key path, as the schema writes it; intervals and differences as one."""
    if isinstance(value, dict):
        keys = set(value)
        if keys >= _INTERVAL.keys():
            more = keys - _INTERVAL.keys() - _DIFFERENCE.keys()
            return {place} | {f"{place}.{key}" for key in more}
        free = {
            "metrics": "<metric>", "warm_up": "<phase>", "paths": "<phase>", "paths.<phase>": "<cause>",
        }.get(place)  # fmt: skip
        return set().union(*(shape(v, f"{place}.{free or k}".lstrip(".")) for k, v in value.items()))
    if isinstance(value, list):
        return set().union(*(shape(v, f"{place}[]") for v in value))
    return {place}


def test_every_key_is_told_what_it_means(files: tuple[str, str]) -> None:
    prefill = written("prefill", workload={"phase": "prefill", "sequences": 8})
    found = compare((*files, prefill), silent, 2)
    found["broken"] = ["sentence"]
    # Told in the line of the list.
    told = {f"explained[].phases[].steps[].{key}" for key in ("explained", "all")}
    assert shape(found) - told == COMPARED.keys() - {"explained[].phases[].steps[]"} | {
        "metrics[].differences[]"
    }
    assert shape(replicate(planned(files[0], [], None, 2))) == REPLICATED.keys()


def test_the_page_of_keys_is_the_one_in_the_docs() -> None:
    page = DOCS / "compare.md"
    if not page.exists():
        pytest.skip("docs/make.py has not printed it yet")
    assert page.read_text("utf-8") == compare_page()
