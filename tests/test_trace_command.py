"""`clustersim trace`: how results and views are named, what is printed where, and what damage is called."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from inspected import saved, small

from clustersim.analysis.query import query
from clustersim.analysis.utilization import STATES
from clustersim.analysis.view_schema import VIEWS as MEANINGS
from clustersim.cli import _status
from clustersim.errors import ClustersimError, ResultError
from clustersim.study.inspecting import open_result
from clustersim.study.run import save_failure
from clustersim.trace.record import TABLES

#: View and what it needs besides a result.
VIEWS: dict[str, tuple[str, ...]] = {
    "summary": (),
    "gpus": (),
    "links": (),
    "experts": (),
    "stragglers": (),
    "slice": ("--gpu", "0"),
}

ENDLESS = (
    "select count(*) from range(1000000) a, range(1000000) b, range(1000000) c where a.range < b.range",
    "with recursive t as (select 1 as n union all select n + 1 from t) select count(*) from t",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results/ that holds one result with spans."""
    root = tmp_path_factory.mktemp("made")
    saved(root / "results", small("flows"))
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that the test may spoil; the command runs there. Returns the result's folder."""
    shutil.copytree(made / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return next((tmp_path / "results").iterdir())


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Any:
    def calling(*arguments: str) -> tuple[int, str, str]:
        status = _status(["trace", *arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return calling


def refused(call: Any, *arguments: str) -> str:
    """What is said of a call that must be refused."""
    status, out, err = call(*arguments)
    assert (status, out) == (2, ""), (out, err)
    assert "Traceback" not in err
    return str(err)


# ---- naming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
def test_a_result_is_named_before_or_after_the_view_or_is_the_newest(
    call: Any, place: Path, view: str
) -> None:
    more = VIEWS[view]
    newest = call(view, *more)
    assert newest[0] == 0 and newest[1] and newest[2] == ""
    for name in ("tiny", place.name, f"results/{place.name}"):
        for words in ((name, view), (view, name)):
            status, out, err = call(*words, *more)
            assert (status, err) == (0, "")
            # The summary says by which path it was found.
            assert out.splitlines()[:-1] == newest[1].splitlines()[:-1]


@pytest.mark.parametrize("view", VIEWS)
def test_json_is_alone_on_standard_output(call: Any, place: Path, view: str) -> None:
    status, out, err = call(view, *VIEWS[view], "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["folder"] == f"results/{place.name}"


def test_the_newest_result_is_that_whose_run_ended_last_and_went_well(call: Any, place: Path) -> None:
    other = saved(Path("results"), small("sums", workload={"decode_steps": 1}))
    failed = small(workload={"decode_steps": 3})
    save_failure(failed, Path("results") / "tiny-0123456789ab", RuntimeError("no"))
    for age, folder in enumerate((Path("results/tiny-0123456789ab"), other, place)):
        os.utime(folder / "summary.json", ns=(10**18, 10**18 - age))
    assert open_result(None).folder.name == other.name
    os.utime(place / "summary.json", ns=(10**18, 10**18 + 1))
    assert open_result(None).folder.name == place.name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpuz"], '"gpuz" (did you mean "gpus"?)'),
        (["tiny", "gpuz"], '"gpuz" (did you mean "gpus"?)'),
        (["tiny"], "say what to look at in tiny: summary, gpus"),
        (["tinny", "gpus"], '"tinny" is no result (did you mean "tiny"?)'),
        (["gpus", "tinny"], '"tinny" is no result (did you mean "tiny"?)'),
        (["gpus", "--by", "sever"], 'did you mean "server"'),
        (["gpus", "--over-time", "--state", "waits"], 'did you mean "wait"'),
        (["gpus", "--from", "2"], '--from: "2" has no unit'),
        (["gpus", "--from", "2ns", "--to", "1ns"], "nothing lies between"),
        (["gpus", "--from", "1h"], "is not before the run's end"),
        (["links", "--tier", "gpu-nik"], 'did you mean "gpu-nic"'),
        (["experts", "--layer", "7"], "7 has no experts; those that have: 0, 1"),
        (["experts", "--gpu", "9"], "there is no rank 9 (the nearest is 3); there are 0 to 3"),
        (["experts", "--from", "1us"], "add --over-time"),
        (["stragglers", "--operator", "combin"], 'did you mean "combine"'),
        (["slice", "--gpu", "9"], "there is no rank 9 (the nearest is 3); there are 0 to 3"),
        (["slice", "--gpu", "gpu_1"], 'no GPU "gpu_1" (did you mean "gpu1"?)'),
        (["slice", "--gpu", "1", "--operator", "dispach"], 'did you mean "dispatch"'),
        (["sql", "select * from spanz"], 'there is no table "spanz" (did you mean "spans"?)'),
        (["sql", "select strt from spans"], 'no column "strt" (did you mean "start"?); spans has span,'),
        (["sql", "a", "b", "c"], "put the query in quotes"),
        (["sql", "select 1", "--csv", "--json"], "choose one"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_answered_with_what_is_near(
    call: Any, place: Path, words: list[str], said: str
) -> None:
    assert said in refused(call, *words)


# ---- damaged and foreign folders ------------------------------------------------------------------


def test_without_results_it_is_said_how_to_get_one(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "results: holds no result; `clustersim run FILE` leaves one" in refused(call, "gpus")
    assert '"tiny" is no result; results holds none' in refused(call, "gpus", "tiny")


def cut(folder: Path) -> None:
    path = folder / "trace" / "spans.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def scramble(folder: Path) -> None:
    """Bytes in the middle of the data: the file begins and ends as it should."""
    path = folder / "trace" / "sums.parquet"
    content = bytearray(path.read_bytes())
    content[40:80] = bytes(40)
    path.write_bytes(content)


def swap(folder: Path) -> None:
    shutil.copy(folder / "trace" / "ranks.parquet", folder / "trace" / "sums.parquet")


def reversion(folder: Path) -> None:
    path = folder / "trace" / "facts.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trace_version": 99}))


def mix(folder: Path) -> None:
    path = folder / "trace" / "facts.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scenario_hash": "0123456789ab"}))


def fail(folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps({"name": "tiny", "error": "StuckError: for ever"}))


#: What is done to a result → what is said of it.
DAMAGE = {
    cut: "spans.parquet: damaged",
    scramble: "sums.parquet: damaged",
    swap: "sums.parquet: its columns are not those of sums",
    reversion: "trace version 99 is not one of",
    mix: "parts of two results",
    fail: "the run failed, so there is nothing to look at: StuckError: for ever",
    lambda folder: (
        folder / "trace" / "links.parquet"
    ).unlink(): "links.parquet: missing; the trace is not whole",
    lambda folder: (folder / "trace" / "facts.json").write_text("{"): "facts.json: damaged",
    lambda folder: (folder / "trace" / "facts.json").unlink(): "facts.json is missing",
    lambda folder: (folder / "summary.json").write_text("[]"): "summary.json: damaged",
    lambda folder: (folder / "summary.json").unlink(): "is not a result: there is no summary.json",
    lambda folder: shutil.rmtree(folder / "trace"): "has no folder trace/",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_result_is_told_by_its_file(call: Any, place: Path, damage: Any) -> None:
    damage(place)
    said = refused(call, "gpus", str(place))
    assert DAMAGE[damage] in said and str(place) in said


def test_damage_in_a_table_that_a_view_does_not_need_does_not_stop_it(call: Any, place: Path) -> None:
    scramble(place)
    assert call("links")[0] == 0
    assert "sums.parquet: damaged" in refused(call, "gpus")


def test_a_folder_that_is_no_result_is_told_where_one_is_near(call: Any, place: Path) -> None:
    assert f"did you mean results/{place.name}" in refused(call, "gpus", f"results/{place.name}/trace")
    assert f"did you mean results/{place.name}" in refused(call, "gpus", "results")
    assert "is a file; a result is a folder" in refused(call, "gpus", f"results/{place.name}/summary.json")
    Path("tiny").mkdir()
    assert call("gpus", "tiny")[0] == 0
    Path("tiny.toml").write_text("")
    assert "is a scenario and not a result; did you mean `tiny`?" in refused(call, "gpus", "tiny.toml")


def test_looking_changes_nothing_in_the_folder(call: Any, place: Path) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for view, more in VIEWS.items():
        assert call(view, *more)[0] == 0
    assert call("sql", "select count(*) from spans")[0] == 0
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


# ---- what is shown --------------------------------------------------------------------------------


def test_gpus_by_group_are_means_of_their_gpus(call: Any, place: Path) -> None:
    single = json.loads(call("gpus", "--json")[1])["gpus"]
    for by in ("server", "stage"):
        for group in json.loads(call("gpus", "--by", by, "--json")[1])["gpus"]:
            members = [gpu for gpu in single if str(gpu[by]) == group[by]]
            assert group["gpus"] == len(members)
            for state in STATES:
                assert group[state] == pytest.approx(sum(m[state] for m in members) / len(members))


def test_a_part_of_the_run_has_shares_of_its_own(call: Any, place: Path) -> None:
    found = json.loads(call("gpus", "--from", "1us", "--to", "2us", "--json")[1])
    assert found["window"] == pytest.approx([1e-6, 2e-6])
    for gpu in found["gpus"]:
        assert sum(gpu[state] for state in STATES) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("view", ["gpus", "links", "experts"])
def test_lines_over_time_have_as_many_letters_as_bins(call: Any, place: Path, view: str) -> None:
    status, out, _ = call(view, "--over-time", "--bins", "13")
    lines = [line.split("▏")[1].split("▕")[0] for line in out.splitlines() if "▏" in line]
    assert status == 0 and lines and {len(line) for line in lines} == {13}
    assert any(line.strip() for line in lines)


def test_a_slice_shows_streams_side_by_side_and_waits_as_such(call: Any, place: Path) -> None:
    status, out, _ = call("slice", "--gpu", "0", "--gpu", "gpu2")
    assert status == 0
    assert "rank 0 compute" in out and "rank 2 compute" in out
    pieces = json.loads(call("slice", "--gpu", "0", "--gpu", "gpu2", "--json")[1])["pieces"]
    waits = [piece for piece in pieces if piece["state"] == "wait"]
    assert waits and out.count("· wait r") == len({(w["rank"], w["start"]) for w in waits})


@pytest.mark.parametrize("view", VIEWS)
def test_with_sums_alone_a_view_works_or_says_what_to_set(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("results"), small("sums"))
    status, out, err = call(view, *VIEWS[view])
    if view == "slice":
        assert status == 2 and "--set trace.level=spans" in err
    else:
        assert status == 0 and err == ""
        assert view != "stragglers" or "--set trace.level=spans" in " ".join(out.split())
    assert "--set trace.level=spans" in refused(call, "gpus", "--over-time")
    assert "--set trace.level=spans" in call("sql", "select * from spans")[2]


# ---- SQL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_a_view_with_its_columns_and_rows(place: Path, table: str) -> None:
    answer = query(place / "trace", f"select * from {table}")
    assert answer.columns == list(TABLES[table])
    columns = open_result(str(place)).trace.tables[table]
    assert len(answer.rows) == len(columns[answer.columns[0]])


def test_sql_as_json_csv_and_table_say_the_same(call: Any, place: Path) -> None:
    text = 'select rank, operator, "end" - start as took from spans order by span limit 5'
    found = json.loads(call("sql", text, "--json")[1])
    assert found["columns"] == ["rank", "operator", "took"] and len(found["rows"]) == 5
    sheet = list(csv.reader(io.StringIO(call("sql", text, "tiny", "--csv")[1])))
    assert sheet[0] == found["columns"]
    assert [[int(r), o, float(t)] for r, o, t in sheet[1:]] == found["rows"]
    table = call("sql", "tiny", text)[1].splitlines()
    assert table[0].split() == found["columns"] and len(table) == 6


def test_an_answer_is_cut_where_it_is_wished_and_that_is_said(call: Any, place: Path) -> None:
    status, out, err = call("sql", "select span from spans", "--rows", "3", "--csv")
    assert (status, out) == (0, "span\n0\n1\n2\n") and "cut after 3 rows" in err
    assert not query(place / "trace", "select 1 from range(3)", 3).cut


def test_values_that_json_lacks_become_null_or_text(call: Any, place: Path) -> None:
    text = "select 'nan'::double a, null b, 1.5 c, date '2020-02-03' d, [1, 2] e"
    found = json.loads(call("sql", text, "--json")[1])
    assert found["rows"] == [[None, None, 1.5, "2020-02-03", [1, 2]]]


#: What is no reading of the result's own tables.
FORBIDDEN = [
    "copy (select 1) to 'trace/x.csv'",
    "copy spans to '{trace}/x.parquet'",
    "create table x as select 1",
    "attach 'x.db'",
    "install httpfs",
    "load httpfs",
    "set memory_limit = '1TB'",
    "pragma database_list",
    "call pragma_version()",
    "select 1; select 2",
    "explain analyze copy (select 1) to '{trace}/x.csv'",
    "with x as (select 1) insert into spans select * from x",
    "drop view spans",
    "export database '{trace}'",
    "pivot spans on kind using count(*)",
    "",
    "-- nothing",
]


@pytest.mark.parametrize("text", FORBIDDEN)
def test_sql_only_reads(place: Path, text: str) -> None:
    before = sorted(place.rglob("*"))
    with pytest.raises(ClustersimError, match=r"sql: "):
        query(place / "trace", text.format(trace=place / "trace"))
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "text",
    [
        "select * from read_csv('{other}')",
        "select * from read_text('{other}')",
        "select * from '{other}'",
        "select * from glob('{above}/*')",
        "select * from read_text('{trace}/../../other.csv')",
    ],
)
def test_sql_reads_no_other_file(place: Path, text: str) -> None:
    other = place.parent / "other.csv"
    other.write_text("secret\n1\n")
    names = {"other": other, "above": place.parent, "trace": place / "trace"}
    with pytest.raises(ClustersimError, match=r"only files of this result"):
        query(place / "trace", text.format(**names))


def test_sql_sees_no_variable_of_the_program(place: Path) -> None:
    answer = {"x": [1]}
    assert answer
    with pytest.raises(ClustersimError, match=r'no table "answer"'):
        query(place / "trace", "select * from answer")


def test_a_column_that_is_a_word_of_sql_is_told_to_be_quoted(place: Path) -> None:
    with pytest.raises(ClustersimError, match=r"end is a word of SQL"):
        query(place / "trace", "select end from spans")


@pytest.mark.parametrize(
    "text",
    [
        # DuckDB's own limit, and two that it does not count: many long texts, and one.
        "select list(a.range || repeat('x', 1000)) from range(10000000) a",
        "select repeat('x', 50000000) from range(1000)",
        "select length(repeat('x', 4000000000)) + length(repeat('y', 4000000000))",
    ],
)
def test_a_query_that_needs_too_much_memory_is_refused(place: Path, text: str) -> None:
    with pytest.raises(ClustersimError, match=r"needs more than 2GiB of memory"):
        query(place / "trace", text)


@pytest.mark.parametrize("text", ENDLESS)
def test_a_query_that_takes_too_long_is_ended(call: Any, place: Path, text: str) -> None:
    said = refused(call, "sql", text, "--seconds", "0.5")
    assert "not answered within 0.5 s" in said and "--seconds" in said


@pytest.mark.parametrize("text", ENDLESS)
def test_an_interrupted_query_ends_with_130(place: Path, text: str) -> None:
    command = [sys.executable, "-m", "clustersim.cli", "trace", "sql", text]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        # Not before the query runs, in a process of its own.
        deadline = time.monotonic() + 60
        while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (130, "interrupted")


def test_a_folder_may_be_called_as_one_likes_but_for_patterns(place: Path) -> None:
    quoted = place.rename(place.parent / 'it\'s; my "result"')
    assert query(quoted / "trace", "select count(*) from ranks").rows == [(4,)]
    with pytest.raises(ClustersimError, match=r"takes \*, \? and \[ for a pattern; rename the folder"):
        query(quoted.rename(place.parent / "result [a]") / "trace", "select 1")


def test_a_damaged_table_is_told_by_its_file(place: Path) -> None:
    cut(place)
    with pytest.raises(ResultError, match=r"spans\.parquet: damaged"):
        query(place / "trace", "select * from spans")


# ---- what is no whole result ----------------------------------------------------------------------


@pytest.mark.parametrize("view", [*VIEWS, "bounds"])
@pytest.mark.parametrize("part", ["trace/spans.parquet", "trace/facts.json", "scenario.toml"])
def test_a_pipe_in_the_place_of_a_file_is_refused(call: Any, place: Path, view: str, part: str) -> None:
    (place / part).unlink()
    os.mkfifo(place / part)
    said = refused(call, view, *VIEWS.get(view, ()))
    assert f"{part}: damaged: not a regular file" in said


@pytest.mark.parametrize("words", [("gpus",), ("why", "0"), ("sql", "select 1"), ("bounds",)])
def test_a_result_without_its_scenario_is_not_whole(call: Any, place: Path, words: tuple[str, ...]) -> None:
    (place / "scenario.toml").unlink()
    assert "scenario.toml: missing; the result is not whole" in refused(call, *words)


def test_copies_are_sorted_by_what_is_asked(call: Any, place: Path) -> None:
    def copies(*more: str) -> list[Any]:
        found: list[Any] = json.loads(call("experts", "--json", *more)[1])["copies"]
        return found

    own = [copy["wait"]["behind"] + copy["service"] for copy in copies()]
    assert own == sorted(own, reverse=True) and len(set(own)) > 1
    for name in ("load", "service"):
        values = [copy[name] for copy in copies("--sort", name)]
        assert values == sorted(values, reverse=True)
    for name, key in (("wait", "mean"), ("behind", "behind")):
        values = [copy["wait"][key] for copy in copies("--sort", name)]
        assert values == sorted(values, reverse=True)
    for copy in copies():
        wait = copy["wait"]
        assert wait["coming"] + wait["behind"] == pytest.approx(wait["mean"], abs=1e-12)
    assert '--sort: "lod" is not known (did you mean "load"?)' in refused(call, "experts", "--sort", "lod")


def test_an_operator_that_is_none_is_answered_by_those_that_ranks_waited_in(call: Any, place: Path) -> None:
    waited = [one["operator"] for one in json.loads(call("stragglers", "--json")[1])["operators"]]
    said = refused(call, "stragglers", "--operator", f"{waited[-1]}x")
    offered = said.strip().partition("ranks waited for others in ")[2].split(", ")
    assert sorted(offered) == sorted(waited) and offered[0] == waited[-1]


def test_a_summary_with_a_word_in_the_place_of_a_number_is_damaged(call: Any, place: Path) -> None:
    path = place / "summary.json"
    whole = json.loads(path.read_text("utf-8"))
    whole["latency"]["step"]["mean"] = "<script>"
    path.write_text(json.dumps(whole), "utf-8")
    assert "damaged: latency.step.mean holds text, not a number" in refused(call, "summary")
    del whole["latency"]
    path.write_text(json.dumps(whole), "utf-8")
    assert "damaged: latency is missing" in refused(call, "summary")


# ---- what keys mean -------------------------------------------------------------------------------


def _keys(value: Any, known: dict[str, str], place: str = "") -> set[str]:
    """Every key in a value, written as in the table."""
    if place in known or value is None or value in ([], {}):
        return {place}
    if isinstance(value, list):
        return {key for entry in value for key in _keys(entry, known, f"{place}[]")}
    if isinstance(value, dict):
        found = set()
        for name, entry in value.items():
            below = f"{place}.{name}" if place else name
            wild = next((k.split(">")[0] for k in known if k.startswith(f"{place}.<")), None)
            below = below if wild is None else f"{wild}>"
            found |= _keys(entry, known, below)
        return found
    return {place}


@pytest.mark.parametrize(
    "words",
    [
        ("summary",),
        ("gpus", "--over-time"),
        *(("gpus", "--by", by) for by in ("server", "stage", "shard")),
        ("links", "--over-time", "--each", "2"),
        ("experts", "--over-time"),
        ("stragglers",),
        ("slice", "--gpu", "0"),
        ("sql", "select * from spans"),
        ("why", "0"),
        ("why", "request:0", "--all"),
        ("bounds",),
        ("export", "--format", "csv"),
        ("export",),
    ],
)
def test_every_key_of_a_view_is_explained(call: Any, place: Path, words: tuple[str, ...]) -> None:
    status, out, err = call(*words, "--json")
    assert status == 0, err
    known = MEANINGS[words[0]]
    for key in _keys(json.loads(out), known):
        # Nothing there: null, or an empty list or table, of whose entries the table tells.
        assert key in known or any(one.startswith((f"{key}.", f"{key}[")) for one in known), key
