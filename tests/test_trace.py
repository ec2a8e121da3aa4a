"""A trace comes back from disk as it went; a result folder is whole or not there."""

from __future__ import annotations

import errno
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scenarios import table as rows_of
from synthetic import FACTS, tiny

from clustersim.analysis.summary import summarize
from clustersim.errors import ResultError
from clustersim.spec.reading import read_scenario
from clustersim.trace import files, results
from clustersim.trace.plain import json_text, plain
from clustersim.trace.record import TABLES, Recorder, Text, Trace
from clustersim.trace.spill import Spill


def assert_equal(one: Trace, other: Trace) -> None:
    assert one.facts == other.facts
    assert one.tables.keys() == other.tables.keys() == TABLES.keys()
    for table, columns in one.tables.items():
        assert list(columns) == list(other.tables[table])
        for name, column in columns.items():
            again = other.tables[table][name]
            if isinstance(column, Text):
                assert isinstance(again, Text)
                assert column.words == again.words, (table, name)
                column, again = column.codes, again.codes
            assert isinstance(again, np.ndarray)
            assert column.dtype == again.dtype, (table, name)
            np.testing.assert_array_equal(column, again)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_trace_comes_back_as_it_was_written(tmp_path: Path) -> None:
    trace = tiny(faults=True)
    files.write(trace, tmp_path)
    assert_equal(trace, files.read(tmp_path))


def test_empty_tables_and_unused_words_come_back(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.code("flows", "operator", "never used")
    for word in ("unused", "combine"):
        recorder.code("sums", "operator", word)
    recorder.rows("memory", rank=0, part="weights", bytes=1.0)
    trace = recorder.finish(FACTS)
    files.write(trace, tmp_path)
    assert_equal(trace, files.read(tmp_path))


def test_words_keep_their_order_over_several_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ROW_GROUP", 10)
    recorder = Recorder()
    names = [f"vertex {n}" for n in range(100)][::-1]
    numbers = np.random.default_rng(1).integers(0, 1000, 100)
    recorder.rows("memory", rank=numbers, part=names, bytes=numbers * 0.1)
    recorder.rows("memory", rank=0, part="vertex 50", bytes=1.0)
    trace = recorder.finish(FACTS)
    files.write(trace, tmp_path)
    assert pq.ParquetFile(tmp_path / "memory.parquet").num_row_groups == 11
    assert_equal(trace, files.read(tmp_path))


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        files.write(tiny(), tmp_path / name)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "other")


def test_what_was_read_is_written_to_the_same_bytes(tmp_path: Path) -> None:
    files.write(tiny(), tmp_path / "one")
    files.write(files.read(tmp_path / "one"), tmp_path / "other")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "other")


def test_numbers_reach_arrow_without_a_copy() -> None:
    columns = tiny().tables["spans"]
    table = files.to_arrow(columns, "spans")
    start = columns["start"]
    assert isinstance(start, np.ndarray)
    assert np.shares_memory(table["start"].chunk(0).to_numpy(), start)
    assert table["operator"].to_pylist() == ["attention", "attention", "combine", "combine"]


def test_every_column_carries_its_sentence_and_unit(tmp_path: Path) -> None:
    files.write(tiny(), tmp_path)
    for table, columns in TABLES.items():
        schema = pq.read_schema(tmp_path / f"{table}.parquet")
        for name, (_, doc) in columns.items():
            assert schema.field(name).metadata[b"doc"].decode() == doc
    spans = pq.read_schema(tmp_path / "spans.parquet")
    assert spans.field("met").metadata[b"unit"] == b"s"
    assert b"unit" not in spans.field("rank").metadata


def _cut(folder: Path) -> None:
    path = folder / "spans.parquet"
    path.write_bytes(path.read_bytes()[:-40])


def _other_columns(folder: Path) -> None:
    pq.write_table(pa.table({"span": [1]}), folder / "spans.parquet")


def _other_type(folder: Path) -> None:
    table = pq.read_table(folder / "memory.parquet")
    pq.write_table(table.set_column(0, "rank", pa.array([0.5] * len(table))), folder / "memory.parquet")


def _with_gaps(folder: Path) -> None:
    table = pq.read_table(folder / "memory.parquet")
    gaps = pa.array([None] * len(table), type=pa.int32())
    pq.write_table(table.set_column(0, "rank", gaps), folder / "memory.parquet")


def _claiming(folder: Path, version: str) -> None:
    table = pq.read_table(folder / "queues.parquet")
    about = {**table.schema.metadata, b"trace_version": version.encode()}
    pq.write_table(table.replace_schema_metadata(about), folder / "queues.parquet")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no spans": lambda folder: (folder / "spans.parquet").unlink(),
    "cut spans": _cut,
    "empty file": lambda folder: (folder / "spans.parquet").write_bytes(b""),
    "other columns": _other_columns,
    "other type": _other_type,
    "gaps": _with_gaps,
    "no facts": lambda folder: (folder / "facts.json").unlink(),
    "cut facts": lambda folder: (folder / "facts.json").write_text('{"name": '),
    "binary facts": lambda folder: (folder / "facts.json").write_bytes(b"\xff\xfe"),
    "other facts": lambda folder: (folder / "facts.json").write_text("[1]"),
    "another table's file": lambda folder: (folder / "waits.parquet").write_bytes(
        (folder / "sums.parquet").read_bytes()
    ),
    "another version's file": lambda folder: _claiming(folder, "7"),
    "other version": lambda folder: (folder / "facts.json").write_text('{"trace_version": 99}'),
}


def test_every_file_says_which_table_of_which_version_it_is(tmp_path: Path) -> None:
    files.write(tiny(), tmp_path)
    for table in TABLES:
        about = pq.read_schema(tmp_path / f"{table}.parquet").metadata
        assert (about[b"table"].decode(), about[b"trace_version"].decode()) == (
            table,
            str(files.TRACE_VERSION),
        )


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_trace_is_refused_with_its_file_named(tmp_path: Path, damage: str) -> None:
    files.write(tiny(), tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(ResultError, match=str(tmp_path)):
        files.read(tmp_path)


def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    trace = tiny()
    files.write(trace, tmp_path)
    path = tmp_path / "spans.parquet"
    whole, refused = path.read_bytes(), 0
    for place in range(4, len(whole), 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert_equal(trace, files.read(tmp_path))
        except ResultError:
            refused += 1
    assert refused > 40


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no trace"):
        files.read(tmp_path / "nowhere")


def test_nothing_that_is_not_finite_reaches_json() -> None:
    value = {
        "a": float("nan"),
        "b": [np.float64("inf"), np.int64(3)],
        "c": np.array([1.0, np.nan]),
        4: (True,),
    }
    assert plain(value) == {"a": None, "b": [None, 3], "c": [1.0, None], "4": [True]}
    assert json.loads(json_text(value)) == plain(value)
    with pytest.raises(TypeError, match="set"):
        plain({1, 2})


def test_a_result_is_written_whole_and_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "tiny-0123456789ab"
    results.write_result(folder, 'name = "tiny"\n', {"name": "tiny", "x": float("nan")}, tiny())
    assert (folder / "scenario.toml").read_text() == 'name = "tiny"\n'
    assert results.read_summary(folder) == {"name": "tiny", "x": None}
    assert_equal(files.read(folder / "trace"), tiny())
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_result_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    results.write_result(tmp_path / "result", "", {}, None)
    assert (tmp_path / "result").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_result_replaces_the_older_one_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-0123456789ab"
    results.write_result(folder, "", {"run": 1}, tiny())
    results.write_result(folder, "", {"run": 2, "error": "out of luck"}, None)
    assert results.read_summary(folder)["run"] == 2
    assert sorted(p.name for p in folder.iterdir()) == ["scenario.toml", "summary.json"]
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    results.write_result(tmp_path / "empty", "", {"run": 1}, None)
    assert results.read_summary(tmp_path / "empty") == {"run": 1}


def test_what_is_not_a_result_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("home", "file", "dangling"):
        with pytest.raises(ResultError, match=name):
            results.write_result(tmp_path / name, "", {}, None)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "home"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, OSError])
@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_failure_while_writing_leaves_the_old_result_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException], where: str
) -> None:
    folder = tmp_path / "tiny-0123456789ab"
    results.write_result(folder, "", {"run": 1}, tiny())
    before = folder_bytes(folder)
    real = Path.rename

    def failing_write(trace: Trace, place: Path) -> None:
        place.mkdir()
        (place / "half.parquet").write_text("half")
        raise failure("stop")

    def failing_rename(self: Path, target: Path) -> Path:
        if self.name == "fresh":
            raise failure("stop")
        return real(self, target)

    if where == "write":
        monkeypatch.setattr(files, "write", failing_write)
    else:
        monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(ResultError if failure is OSError else failure):
        results.write_result(folder, "", {"run": 2}, tiny())
    assert folder_bytes(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_a_result_that_another_run_puts_there_meanwhile_is_replaced_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny-0123456789ab"
    real = Path.rename
    raced: list[bool] = []

    def racing_rename(self: Path, target: Path) -> Path:
        if self.name == "fresh" and not raced:
            raced.append(True)
            folder.mkdir()
            (folder / "summary.json").write_text("{}")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", racing_rename)
    results.write_result(folder, "", {"run": 2}, None)
    assert results.read_summary(folder) == {"run": 2}
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_damaged_summaries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="not a result"):
        results.read_summary(tmp_path)
    for content in (b"{", b"[]", b"\xff"):
        (tmp_path / "summary.json").write_bytes(content)
        with pytest.raises(ResultError, match="damaged"):
            results.read_summary(tmp_path)


def _result(root: Path, name: str, age: int, content: str = "{}") -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "summary.json").write_text(content)
    os.utime(folder / "summary.json", ns=(10**18 - age, 10**18 - age))
    return folder


def test_the_newest_whole_result_of_just_that_scenario_is_found(tmp_path: Path) -> None:
    _result(tmp_path, "large_ep-000000000001", age=30)
    wanted = _result(tmp_path, "large_ep-000000000002", age=20)
    _result(tmp_path, "large_ep-000000000003", age=10, content='{"error": "does not fit"}')
    _result(tmp_path, "large_ep-000000000004", age=9, content="{")
    (tmp_path / "large_ep-000000000005").mkdir()
    (tmp_path / "large_ep-000000000006").write_text("a file")
    for other in ("large_ep_prefill-000000000007", "large_ep-b-000000000008", "large_ep-copy", "large_ep"):
        _result(tmp_path, other, age=1)
    _result(tmp_path, ".large_ep-000000000009.x", age=0)
    assert results.newest(tmp_path, "large_ep") == wanted
    assert results.newest(tmp_path, "large") is None
    assert results.newest(tmp_path / "nowhere", "large_ep") is None


# ---- what is too much for memory ----------------------------------------------------------------


def long_recorder(store: Spill | None) -> Recorder:
    """300 rows of memory in blocks of 7, with ever more words; one row each of ranks and faults."""
    recorder = Recorder(store)
    recorder.rows("faults", kind="slow_gpu", place="rank 1", start=0.0, end=1.0, factor=2.0)
    for first in range(0, 300, 7):
        rows = np.arange(first, min(first + 7, 300))
        parts = [f"part {row // 20}" for row in rows]
        recorder.rows("memory", rank=rows, part=parts, bytes=rows * 0.1)
    return recorder


@pytest.mark.parametrize("rows", [1, 40, 50, 120, 299, 300, 1000])
def test_a_trace_has_the_same_bytes_however_much_of_it_was_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(files, "ROW_GROUP", 50)
    kept = long_recorder(None).finish(FACTS)
    spilled = long_recorder(Spill(tmp_path, rows)).finish(FACTS)
    assert_equal(kept, spilled)
    for name, trace in (("kept", kept), ("spilled", spilled)):
        files.write(trace, tmp_path / name)
    assert folder_bytes(tmp_path / "kept") == folder_bytes(tmp_path / "spilled")
    assert pq.ParquetFile(tmp_path / "spilled" / "memory.parquet").num_row_groups == 6


def test_what_was_spilled_goes_with_the_trace_and_stays_where_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ROW_GROUP", 50)
    trace = long_recorder(Spill(tmp_path, 50)).finish(FACTS)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(".") and [path.name for path in folder.iterdir()] == ["memory.parquet"]
    results.write_result(tmp_path / "one", "", {}, trace)
    results.write_result(tmp_path / "two", "", {}, trace)
    del trace
    gc.collect()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    for name in ("one", "two"):
        assert_equal(files.read(tmp_path / name / "trace"), long_recorder(None).finish(FACTS))
    # Two results are two: what befalls one file does not befall the other.
    (tmp_path / "one" / "trace" / "memory.parquet").write_bytes(b"")
    assert_equal(files.read(tmp_path / "two" / "trace"), long_recorder(None).finish(FACTS))


def test_nothing_is_written_while_tables_are_short(tmp_path: Path) -> None:
    trace = long_recorder(Spill(tmp_path, 1000)).finish(FACTS)
    assert not list(tmp_path.iterdir())
    assert_equal(trace, long_recorder(None).finish(FACTS))


def test_discarded_rows_leave_nothing(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 1)
    long_recorder(spill)
    assert list(tmp_path.iterdir())
    spill.discard()
    assert not list(tmp_path.iterdir())


def test_no_room_on_disk_is_told_with_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.TableWriter, "write", full)
    with pytest.raises(ResultError, match=f"{tmp_path}.*No space left"):
        long_recorder(Spill(tmp_path, 10))


def test_columns_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    files.write(tiny(), tmp_path)
    trace = files.read(tmp_path)
    (tmp_path / "waits.parquet").unlink()
    assert trace.tables["spans"]["rank"].tolist() == [0, 1, 0, 1]
    with pytest.raises(ResultError, match=r"waits\.parquet: missing"):
        trace.tables["waits"]["seconds"]
    with pytest.raises(KeyError):
        trace.tables["spans"]["weight"]


# ---- stored results -----------------------------------------------------------------------------

STORED = Path(__file__).parent / "stored"


@pytest.mark.parametrize("version", files.READABLE)
def test_stored_results_stay_readable_and_their_laws_hold(version: int) -> None:
    folder = STORED / f"v{version}"
    trace, summary = files.read(folder / "trace"), results.read_summary(folder)
    assert json.loads((folder / "trace" / "facts.json").read_text())["trace_version"] == version
    spans, links, flows, steps = (rows_of(trace, name) for name in ("spans", "links", "flows", "steps"))
    assert summary["simulated_seconds"] == trace.facts["simulated_seconds"] == steps["end"].max()
    # What was reckoned then is reckoned now; keys may have been added since.
    assert summary["throughput"].items() <= summarize(trace)["throughput"].items()
    assert (spans["start"] <= spans["met"]).all() and (spans["met"] <= spans["end"]).all()
    after = spans["after"] >= 0
    np.testing.assert_array_equal(spans["end"][spans["after"][after]], spans["met"][after])
    assert flows["wire"].sum() <= links["bytes"].sum()
    assert read_scenario(folder / "scenario.toml").name == trace.facts["name"]
    newer = [rows_of(trace, name) for name in ("span_links", "link_use", "kv_use")]
    if version < 4:
        assert (spans["group"] == -1).all() and np.isnan(spans["priced"]).all()
        assert not any(len(column) for columns in newer for column in columns.values())
    else:
        assert ((spans["group"] >= 0) == (spans["kind"] == "exchange")).all()
        compute = spans["kind"] == "compute"
        taken = (spans["end"] - spans["start"])[compute]
        # GPU 3 is twice as slow.
        slow = np.where(spans["rank"][compute] == 3, 2.0, 1.0)
        np.testing.assert_allclose(taken, spans["priced"][compute] * slow, rtol=1e-9)
        carried = np.bincount(newer[1]["link"], newer[1]["bytes"], minlength=len(links["bytes"]))
        np.testing.assert_allclose(carried, links["bytes"], rtol=1e-9)


def test_an_older_result_is_written_anew_as_one_of_the_present_version(tmp_path: Path) -> None:
    trace = files.read(STORED / "v3" / "trace")
    files.write(trace, tmp_path)
    again = files.read(tmp_path)
    assert_equal(trace, again)
    assert json.loads((tmp_path / "facts.json").read_text())["trace_version"] == files.TRACE_VERSION


def test_every_readable_version_has_a_stored_result() -> None:
    assert {path.name for path in STORED.iterdir()} == {f"v{version}" for version in files.READABLE}
