"""A trace comes back from disk as it went; a result folder is whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import FACTS, tiny

from clustersim.errors import ResultError
from clustersim.trace import files, results
from clustersim.trace.plain import json_text, plain
from clustersim.trace.record import TABLES, Recorder, Text, Trace


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
    "other version": lambda folder: (folder / "facts.json").write_text('{"trace_version": 99}'),
}


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
