"""Predicted against measured: what the command prints, and what the tables it reads hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from clustersim.cli import _status
from clustersim.errors import ClustersimError
from clustersim.report.scatter import scatter
from clustersim.study import validate
from clustersim.study.families import FAMILIES
from clustersim.study.measured import FOLDER, MEASURED, measured
from clustersim.study.pack import main as pack_main
from clustersim.study.pack import pack, read_csv
from clustersim.study.prediction import ruled_by
from clustersim.trace.files import read_columns, write_columns


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return validate.validate_network()


def test_errors_are_within_what_is_stated(found: dict[str, Any]) -> None:
    assert found["kept"], [one for file in found["files"] for one in file["judged"] if not one["kept"]]


def test_every_miss_of_a_goal_has_its_reason(found: dict[str, Any]) -> None:
    judged = [(file["file"], one) for file in found["files"] for one in file["judged"]]
    for name, one in judged:
        assert one["met"] or one["why_missed"], (name, one)
    assert set(validate.MISSES) <= {(name, one["ruled"]) for name, one in judged}


def test_every_file_of_a_family_is_shown_with_its_classes_and_examples(found: dict[str, Any]) -> None:
    files = {file["file"]: file for file in found["files"]}
    assert list(files) == [name for family in FAMILIES.values() for name in family.files]
    for file in files.values():
        assert sum(one["rows"] for one in file["classes"]) == file["predicted"]["rows"]
        assert sum(one["rows"] for one in file["judged"]) == file["predicted"]["rows"] >= file["fitted"]
        assert {one["kind"] for one in file["examples"]} == {one["kind"] for one in file["classes"]}


def test_leaving_a_file_out_moves_the_others_by_less_than_its_own_error(found: dict[str, Any]) -> None:
    names = [name for family in FAMILIES.values() for name in family.files]
    assert [one["file"] for one in found["leave_one_out"]] == names
    assert all(one["holds"] for one in found["leave_one_out"])


def test_more_gpus_than_the_fit_sees_are_foretold() -> None:
    larger = [one for one in validate.all_predictions() if one.gpus > 16 and one.kind == "all_reduce"]
    assert len(larger) >= 8 and not any(one.fitted for one in larger)
    assert np.median([abs(one.error) for one in larger]) < 0.15


def test_the_command_prints_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(["validate", "network", "--json", "--quick"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) >= {"boundary", "goals", "files", "leave_one_out", "kept"}
    for file in printed["files"]:
        for one in file["examples"]:
            assert math.isfinite(one["error"]) and one["measured"] > 0 and one["predicted"] > 0


def test_the_command_prints_a_page_and_leaves_the_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _status(["validate", "network", "--quick", "--out", str(tmp_path / "new")]) == 0
    page = capsys.readouterr().out
    assert "predicted against measured" in page and "within the stated errors" in page
    assert (tmp_path / "new" / "predictions.svg").read_text("utf-8") == validate.drawing()
    rows = read_columns(tmp_path / "new" / "predictions.parquet")
    assert len(rows["measured"]) == len(validate.all_predictions())
    assert {"file", "row", "measured", "predicted", "ruled", "fitted"} <= set(rows)


def test_larger_errors_than_stated_give_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(validate.GOALS, "bandwidth", (1e-6, 1e-6))
    assert _status(["validate", "network", "--quick"]) == 1
    assert "OUTSIDE of the stated errors" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["validate"], ["validate", "netwrok"], ["validate", "network", "--qick"]]
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(["validate", *arguments]) == 2
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert _status(["validate", "network", "--quick", "--out", str(tmp_path / "file" / "x")]) == 2
    assert "--out" in capsys.readouterr().err


def test_bandwidth_rules_where_the_port_is_busy_most_of_the_time() -> None:
    assert ruled_by(0.5, 1.0) == "bandwidth" and ruled_by(0.3, 1.0) == "latency"


def test_the_drawing_has_a_dot_where_a_row_lies() -> None:
    drawn = ElementTree.fromstring(scatter({"a & b": [(1e-6, 1e-6), (1e-3, 1.0)], "c": [(1e-6, 1e-6)]}))
    dots = [one.get("d") for one in drawn.iter("{http://www.w3.org/2000/svg}path")]
    # Equal times lie in the middle, at a ratio of 1; what is off by more lies on the edge.
    assert dots == ["M69 239h3v3h-3zM789 29h3v3h-3z", "M69 239h3v3h-3z"]


@pytest.mark.parametrize("name", MEASURED)
def test_every_measured_row_has_a_source_and_every_table_a_licence(name: str) -> None:
    assert all(measured(name)["source"])
    lines = (FOLDER / "README.md").read_text("utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| {name} |")).split("|")
    assert int(row[2]) == len(measured(name)["source"]) and row[4].strip()


def test_the_notice_names_every_repository_that_rows_come_from() -> None:
    notice = (FOLDER / "NOTICE").read_text("utf-8")
    cited = {
        place
        for name in MEASURED
        for source in set(measured(name)["source"])
        for place in re.findall(r"[\w.-]+/[\w.-]+@[0-9a-f]{6,}", source)
    }
    assert len(cited) > 10
    missing = [place for place in sorted(cited) for part in place.split("@") if part not in notice]
    assert not missing


def test_the_measured_tables_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1 << 20


def test_unknown_tables_are_named() -> None:
    with pytest.raises(ClustersimError, match="did you mean"):
        measured("nccl_intranodes")


def test_columns_come_back_as_they_were_and_as_the_same_bytes(tmp_path: Path) -> None:
    columns = {"a": np.array([1, 2]), "b": np.array([0.5, np.nan]), "c": np.array(["x", ""])}
    for name in ("one", "two"):
        write_columns(columns, tmp_path / name)
    back = read_columns(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert list(back) == list(columns)
    for name, column in columns.items():
        np.testing.assert_array_equal(back[name], column)


def test_csv_files_become_numbers_where_they_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('gpu,n,time_us,note\nA100,2,1.5,"a, b"\nH100,8,,\n')
    columns = read_csv(path)
    assert columns["n"].dtype == np.int64 and columns["n"].tolist() == [2, 8]
    assert columns["time_us"][0] == 1.5 and math.isnan(columns["time_us"][1])
    assert columns["note"].tolist() == ["a, b", ""]


@pytest.mark.parametrize(
    ("text", "said"), [("", "has no rows"), ("a,b\n", "has no rows"), ("a,b\n1\n", "a.csv:2: has 1 fields")]
)
def test_broken_csv_files_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ClustersimError, match=said):
        read_csv(path)


def test_nothing_is_packed_where_a_file_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ClustersimError, match="cannot be read"):
        pack(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert pack_main([]) == 2 and pack_main([str(tmp_path)]) == 2
    assert "usage" in capsys.readouterr().err
