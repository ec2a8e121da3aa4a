"""Other people's traffic: what is read, what is refused and how, and the times that come out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clustersim.cli import _status
from clustersim.errors import ClustersimError
from clustersim.physics.fidelity import NETWORKS, build
from clustersim.physics.replay import Traffic, replay
from clustersim.study.network import replay_case
from clustersim.study.traffic import read_case
from clustersim.trace.csv import to_csv

ORACLES = Path(__file__).parent / "oracles"
CASES = sorted(folder.name for folder in ORACLES.iterdir() if folder.is_dir())

LINKS = """link_id,name,bw_GBps,lat_us
0,out,50,1
1,in,50,1
7,slow,25,2
"""
FLOWS = """flow_id,src,dst,bytes,start_us,after,path
0,0,1,1000000,0,,0;1
5,0,1,500000,3.5,,0;1
9,1,0,250000,1,0;5,7
"""


class Streams:
    """What a call of the command line gave."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Any:
    def calling(*arguments: str) -> Streams:
        status = _status(list(arguments))
        return Streams(status, *capfd.readouterr())

    return calling


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small case in an empty folder, which is also where the command runs."""
    monkeypatch.chdir(tmp_path)
    return put("case")


def put(folder: str | Path, links: str | bytes = LINKS, flows: str | bytes = FLOWS) -> Path:
    place = Path(folder)
    place.mkdir(exist_ok=True)
    for name, content in (("links.csv", links), ("flows.csv", flows)):
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return place


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def times(text: str) -> dict[int, tuple[float, float]]:
    """flow id → release and finish, us."""
    lines = list(csv.DictReader(io.StringIO(text)))
    return {int(one["flow_id"]): (float(one["release_us"]), float(one["finish_us"])) for one in lines}


def answers(case: Path) -> dict[int, tuple[float, float]]:
    return times(gzip.decompress((case / "simgrid.csv.gz").read_bytes()).decode())


# --- times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_command_gives_the_times_of_simgrid(name: str, call: Any) -> None:
    done = call("network", str(ORACLES / name), "--out", "-")
    found, expected = times(done.out), answers(ORACLES / name)
    assert done.status == 0 and done.err == "" and list(found) == list(expected)
    for flow, (release, finish) in expected.items():
        assert found[flow][1] - found[flow][0] == pytest.approx(finish - release, rel=1e-6), flow
        assert found[flow][0] == pytest.approx(release, rel=1e-6, abs=1e-9), flow


def test_a_case_reckoned_by_hand(case: Path, call: Any) -> None:
    # 0 sends from 2 us on at 50 GB/s; 5 joins at 3.5 + 2 us, when 175 kB are sent: 25 GB/s each.
    # 5 is done 500 kB / 25 GB/s = 20 us later, at 25.5 us; 0 then has 825 - 500 = 325 kB left,
    # 6.5 us at 50 GB/s: 32 us. 9 waits for both, then 2 us, then 250 kB at 25 GB/s: 10 us.
    found = times(call("network", str(case), "--out", "-").out)
    assert found == {
        0: pytest.approx((0, 32), rel=1e-6),
        5: pytest.approx((3.5, 25.5), rel=1e-6),
        9: pytest.approx((32, 44), rel=1e-6),
    }


@pytest.mark.parametrize("fidelity", NETWORKS)
def test_a_flow_without_bytes_takes_its_latency_and_one_without_a_path_no_time(
    fidelity: str, case: Path, call: Any
) -> None:
    rows = "1,0,1,0,5,,0;7\n2,0,0,1e6,1,,\n3,0,0,0,0,1;2,\n4,0,1,25e6,0,,7\n"
    put(case, flows=FLOWS.splitlines()[0] + "\n" + rows)
    done = call("network", str(case), "--fidelity", fidelity, "--out", "-")
    found = times(done.out)
    assert (found[1], found[2], found[3]) == (pytest.approx((5, 8)), (1, 1), pytest.approx((8, 8)))
    assert found[4] == pytest.approx((0, 1002), rel=1e-6)
    assert "2 flows have an empty path" in call("network", str(case), "--fidelity", fidelity).out


def brute(traffic: Traffic) -> tuple[np.ndarray, np.ndarray]:
    """Release and finish by progressive filling, from scratch at every event."""
    flows = len(traffic.size)
    after = [traffic.after[a:b] for a, b in zip(traffic.after_first[:-1], traffic.after_first[1:])]  # noqa: B905
    paths = [row[row >= 0] for row in traffic.links]
    release, finish = np.full((2, flows), np.nan)
    left, now = traffic.size.copy(), 0.0
    while np.isnan(finish).any():
        for f in range(flows):
            if np.isnan(release[f]) and not np.isnan(finish[after[f]]).any():
                release[f] = max(traffic.start[f], finish[after[f]].max(initial=0.0))
        begins = release + traffic.latency
        active = [f for f in range(flows) if np.isnan(finish[f]) and begins[f] <= now]
        rate, room, open_ = np.zeros(flows), traffic.bandwidth.copy(), set(active)
        while open_:
            load = np.bincount(np.concatenate([paths[f] for f in open_]), minlength=len(room))
            fair = np.where(load > 0, room / np.maximum(load, 1), np.inf)
            full = int(np.argmin(fair))
            for f in sorted(f for f in open_ if full in paths[f]):
                rate[f] = fair[full]
                room[paths[f]] -= fair[full]
                open_.remove(f)
        ends = {f: now + left[f] / rate[f] for f in active}
        to_come = [b for f, b in enumerate(begins) if np.isnan(finish[f]) and b > now]
        then = min([*ends.values(), *to_come])
        for f in active:
            left[f] -= rate[f] * (then - now)
            if ends[f] <= then * (1 + 1e-13):
                finish[f] = then
        now = then
    return release, finish


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    links, flows = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bandwidth = rng.choice([10e9, 25e9, 50e9], links)
    table = np.full((flows, links), -1, dtype=np.int32)
    for row in table:
        path = rng.permutation(links)[: rng.integers(1, links + 1)]
        row[: len(path)] = path
    # Each waits for flows before it, then all are renumbered: `after` may name later rows, too.
    after = [rng.choice(f, rng.integers(0, min(f, 3) + 1), replace=False) for f in range(flows)]
    new = rng.permutation(flows)
    after = [new[after[old]].astype(np.int64) for old in np.argsort(new)]
    return Traffic(
        bandwidth=bandwidth,
        size=rng.uniform(1e7, 1e9, flows),
        start=rng.choice([0.0, 0.0, 1e-3, 2e-3], flows),
        latency=rng.uniform(0, 1e-4, flows),
        links=table,
        after_first=np.cumsum([0, *map(len, after)]),
        after=np.concatenate(after),
    )


@settings(deadline=None, max_examples=150)
@given(traffics())
def test_a_replay_gives_the_times_of_progressive_filling(traffic: Traffic) -> None:
    release, finish = replay(traffic, build("fluid", traffic.bandwidth, 1e6))
    expected = brute(traffic)
    assert release == pytest.approx(expected[0], rel=1e-6)
    assert finish - release == pytest.approx(expected[1] - expected[0], rel=1e-6)


@pytest.mark.parametrize("fidelity", NETWORKS)
@settings(deadline=None, max_examples=30)
@given(traffics())
def test_a_flow_is_released_when_all_it_waits_for_are_done_and_not_before_its_start(
    fidelity: str, traffic: Traffic
) -> None:
    release, finish = replay(traffic, build(fidelity, traffic.bandwidth, 1e8))
    for flow in range(len(release)):
        after = traffic.after[traffic.after_first[flow] : traffic.after_first[flow + 1]]
        assert release[flow] == max(traffic.start[flow], finish[after].max(initial=0.0))
        slowest = traffic.bandwidth[traffic.links[flow][traffic.links[flow] >= 0]].min()
        assert (
            finish[flow] - release[flow] >= (traffic.latency[flow] + traffic.size[flow] / slowest) * 0.999999
        )


def test_durations_late_in_a_replay_keep_their_digits(case: Path, call: Any) -> None:
    # Alone for a second each: 1 MB at 50 GB/s after 2 us is 22 us, whenever it happens.
    rows = [f"{n},0,1,1000000,{n * 1_000_000 + n / 7!r},,0;1" for n in range(1000)]
    put(case, flows="\n".join([FLOWS.splitlines()[0], *rows]))
    for release, finish in times(call("network", str(case), "--out", "-").out).values():
        assert finish - release == pytest.approx(22, rel=1e-6)


def test_a_clock_too_coarse_for_a_flow_is_told(case: Path, call: Any) -> None:
    put(case, flows=FLOWS.splitlines()[0] + "\n1,0,1,1,1e12,,0\n")
    assert "1 flow has a duration below what the clock can tell apart" in call("network", str(case)).out


def test_chunks_larger_than_the_flows_are_told(case: Path, call: Any) -> None:
    put(case, flows=FLOWS.splitlines()[0] + "\n1,0,1,1000,0,,0\n")
    said = "1 flow has less than one chunk to send"
    assert said in call("network", str(case), "--fidelity", "chunked").out
    assert said not in call("network", str(case), "--fidelity", "chunked", "--chunk", "100 B").out
    assert said not in call("network", str(case)).out


def test_the_example_of_the_readme_is_found_from_everywhere(case: Path, call: Any) -> None:
    done = call("network", "workloads/traffic/shared_uplink", "--out", "-")
    # From 2.5 us on 0 sends alone, 5 MB until 1 joins at 102.5 us; the other half takes twice as long.
    assert times(done.out)[0] == pytest.approx((0, 302.5), rel=1e-6)


# --- reading -------------------------------------------------------------------------------------


def renamed(rows: list[dict[str, str]], column: str, below: int) -> dict[str, str]:
    new = random.Random(2).sample(range(below), len(rows))
    return {row[column]: str(number) for row, number in zip(rows, new, strict=True)}


def test_order_and_names_of_rows_columns_and_ids_change_nothing(case: Path) -> None:
    rng = random.Random(1)
    source = ORACLES / "random_64_s1"
    links, flows = (
        list(csv.DictReader(io.StringIO(gzip.decompress((source / f"{name}.csv.gz").read_bytes()).decode())))
        for name in ("links", "flows")
    )
    new_link = renamed(links, "link_id", 10**6)
    new_flow = renamed(flows, "flow_id", 10**12)
    for row in links:
        row["link_id"] = new_link[row["link_id"]]
    for row in flows:
        row["flow_id"] = new_flow[row["flow_id"]]
        row["path"] = ";".join(new_link[link] for link in row["path"].split(";"))
        row["comment"] = 'with "quotes", and commas'
    for rows in (links, flows):
        rng.shuffle(rows)
    for name, rows in (("links", links), ("flows", flows)):
        columns = list(rows[0])
        rng.shuffle(columns)
        with (case / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    found = replay_case(case).times()
    expected = replay_case(source).times()
    assert found["flow_id"].tolist() == [int(row["flow_id"]) for row in flows]
    finish = dict(zip(found["flow_id"].tolist(), found["finish_us"].tolist(), strict=True))
    for old, before in zip(expected["flow_id"].tolist(), expected["finish_us"].tolist(), strict=True):
        assert finish[int(new_flow[str(old)])] == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.rstrip("\n"),
        lambda text: "\n".join(",".join(f'"{word}"' for word in line.split(",")) for line in text.split()),
        lambda text: "".join(f"{line},x,\x00y\n" for line in text.split()),
    ],
    ids=["CRLF", "CR", "empty lines", "byte order mark", "no last line end", "quotes", "more columns"],
)
def test_what_other_programs_write_is_understood(change: Any, case: Path) -> None:
    plain = replay_case(case).csv()
    assert replay_case(put("other", change(LINKS), change(FLOWS))).csv() == plain


def test_labels_in_an_unused_column_may_be_of_any_encoding(case: Path) -> None:
    lines = FLOWS.encode().splitlines()
    put(case, flows=b"\n".join(line + b",\xe9t\xe9" for line in lines))
    assert len(read_case(case).flow) == 3


def test_the_plain_file_is_taken_where_a_compressed_one_lies_beside_it(case: Path) -> None:
    (case / "flows.csv.gz").write_bytes(b"not read")
    assert len(read_case(case).flow) == 3


# --- mistakes ------------------------------------------------------------------------------------

HEAD = FLOWS.splitlines()[0] + "\n"


def flows_with(old: str, new: str) -> dict[str, str | bytes]:
    assert old in FLOWS
    return {"flows": FLOWS.replace(old, new)}


def links_with(old: str, new: str) -> dict[str, str | bytes]:
    assert old in LINKS
    return {"links": LINKS.replace(old, new)}


_BYTES = "must be at least 0 and at most 1e+18"
_COLUMNS = "there must be flow_id,src,dst,bytes,start_us,after,path"
BAD: dict[str, tuple[dict[str, str | bytes], str]] = {
    "empty file": ({"flows": ""}, "flows.csv: is empty; its first line should be flow_id,src,dst,"),
    "empty links": ({"links": "\n\n"}, "links.csv: is empty; its first line should be link_id,name,bw_GBps,"),
    "no rows": ({"flows": HEAD}, "flows.csv: holds no row under its header"),
    "missing column": (
        flows_with("start_us", "start"),
        f'flows.csv: row 1, column start_us: is missing (did you mean "start"?); {_COLUMNS}',
    ),
    "column twice": (flows_with("src", "dst"), f"row 1, column dst: stands in it twice; {_COLUMNS}"),
    "not a number": (flows_with("500000", "many"), 'flows.csv: row 3, bytes: "many" is not a finite number'),
    "no number": (flows_with("500000", ""), 'flows.csv: row 3, bytes: "" is not a finite number'),
    "NaN": (flows_with("500000", "NaN"), 'flows.csv: row 3, bytes: "NaN" is not a finite number'),
    "infinite": (flows_with("3.5", "inf"), 'flows.csv: row 3, start_us: "inf" is not a finite number'),
    "overflow": (flows_with("500000", "1e999"), 'flows.csv: row 3, bytes: "1e999" is not a finite number'),
    "negative bytes": (flows_with("500000", "-1"), f'row 3, bytes: "-1" is not allowed; it {_BYTES}'),
    "negative start": (flows_with("3.5", "-3.5"), 'row 3, start_us: "-3.5" is not allowed; it must be at'),
    "start of 1970": (flows_with("3.5", "1.7e15"), 'row 3, start_us: "1.7e15" is not allowed; it must'),
    "negative latency": (links_with("25,2", "25,-2"), 'links.csv: row 4, lat_us: "-2" is not allowed'),
    "no bandwidth": (
        links_with("25,2", "0,2"),
        'links.csv: row 4, bw_GBps: "0" is not a bandwidth; it must be more than 0',
    ),
    "negative bandwidth": (links_with("25,2", "-25,2"), 'row 4, bw_GBps: "-25" is not a bandwidth'),
    "NaN bandwidth": (links_with("25,2", "nan,2"), 'links.csv: row 4, bw_GBps: "nan" is not a finite number'),
    "hardly a bandwidth": (links_with("25,2", "1e-320,2"), 'bw_GBps: "1e-320" is not allowed; it must be at'),
    "flow twice": (flows_with("9,1", "0,1"), "flows.csv: row 4, flow_id: 0 stands in row 2 already"),
    "link twice": (links_with("7,slow", "1,slow"), "links.csv: row 4, link_id: 1 stands in row 3 already"),
    "negative id": (flows_with("9,1", "-9,1"), 'row 4, flow_id: "-9" is not a whole number of at least 0'),
    "fraction for an id": (flows_with("9,1", "9.0,1"), 'row 4, flow_id: "9.0" is not a whole number'),
    "endless id": (flows_with("9,1", "9" * 30 + ",1"), f'row 4, flow_id: "{"9" * 30}" is not a whole number'),
    "unknown link": (
        flows_with("0;5,7", "0;5,6"),
        "flows.csv: row 4, path: there is no link 6 in links.csv (did you mean 7?); its 3 ids lie between 0",
    ),
    "names for ids": (flows_with("0;5,7", "0;5,slow"), 'row 4, path: "slow" is not a list of ids betw'),
    "hole in a path": (flows_with("0;5,7", "0;5,7;;1"), 'row 4, path: "7;;1" is not a list of ids'),
    "link twice in a path": (flows_with("0;5,7", "0;5,7;1;7"), 'row 4, path: "7;1;7" crosses a link twice'),
    "endless path": (
        flows_with("0;5,7", "0;5," + ";".join(["7"] * 257)),
        "row 4, path: 257 links; a path has at most 256",
    ),
    "unknown flow": (
        flows_with("0;5,7", "0;6,7"),
        "flows.csv: row 4, after: there is no flow 6 in flows.csv (did you mean 5?); its 3 ids lie between 0",
    ),
    "waits for itself": (flows_with("0;5,7", "0;9,7"), "row 4, after: flow 9 waits for itself"),
    "circle": (
        flows_with("0,,0;1\n5", "0,9,0;1\n5"),
        "flows.csv: row 2, after: flows wait in a circle: 0 waits for 9 waits for 0; none would ever begin",
    ),
    "too few fields": ({"flows": FLOWS + "10,0,1\n"}, "row 5: has 3 fields, but the header has 7"),
    "too many fields": ({"flows": FLOWS + "10,0,1,1,0,,0,,\n"}, "row 5: has 9 fields, but the header has 7"),
    "open quote": ({"flows": FLOWS + '10,0,1,1,0,,"0\n'}, "flows.csv: row 5: cannot be taken apart: "),
    "line break": ({"flows": FLOWS + '10,0,"\n",1,0,,0\n'}, "a field in quotes holds a line break"),
    "label not UTF-8": ({"flows": FLOWS.encode().replace(b"5,0", b"5,\xff")}, 'row 3, src: "\\udcff" is not'),
    "UTF-16": ({"flows": FLOWS.encode("utf-16")}, "flows.csv: is not text in UTF-8; its first line"),
    "endless line": ({"flows": FLOWS + "x" * (33 << 20)}, "row 5: has 34,603,008 bytes; at most 16,777,216"),
    "empty lines count": (
        {"flows": FLOWS.replace("\n", "\r\n\r\n").replace("500000", "-1")},
        'flows.csv: row 5, bytes: "-1"',
    ),
    "control characters": (flows_with("500000", "\x1b[2Jx"), 'row 3, bytes: "\\x1b[2Jx" is not a finite'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_every_mistake_is_told_with_its_file_its_row_and_its_remedy(name: str, case: Path, call: Any) -> None:
    files, said = BAD[name]
    put(case, **files)
    done = call("network", str(case), "--out", "finish.csv")
    assert done.status == 2 and done.out == ""
    assert said in done.err and done.err.startswith("case/") and "Traceback" not in done.err
    assert max(map(len, done.err.splitlines())) < 300
    assert left_in(case.parent) == ["case"]


def test_rows_like_a_bad_one_are_counted_and_other_mistakes_told_beside(case: Path, call: Any) -> None:
    put(case, flows=FLOWS.replace("000,", "000,-"))
    assert call("network", str(case)).err.splitlines() == [
        'case/flows.csv: row 3, start_us: "-3.5" is not allowed; it must be at least 0 and at most 1e+12 '
        "(and 1 more row like it)",
    ]
    put(case, flows=HEAD + "x,0,1,y,0,,0\n" * 30)
    told = call("network", str(case)).err.splitlines()
    assert len(told) == 21 and told[-1] == "case/flows.csv: there are more mistakes like these"


def test_a_long_circle_is_told_by_its_beginning(case: Path, call: Any) -> None:
    rows = "".join(f"{n},0,1,1,0,{(n + 1) % 1000},0\n" for n in range(1000))
    put(case, flows=HEAD + "5000,0,1,1,0,3,0\n" + rows)
    told = call("network", str(case)).err
    assert "0 waits for 1 waits for 2" in told or "3 waits for 4 waits for 5" in told
    assert "(993 more)" in told


def test_a_long_chain_against_the_order_of_rows_is_no_circle(case: Path) -> None:
    rows = "".join(f"{n},0,1,0,0,{n + 1},\n" for n in range(2000)) + "2000,0,1,50000,0,,0\n"
    found = replay_case(put(case, flows=HEAD + rows))
    assert found.finish == pytest.approx(2e-6)


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8bno", b"", gzip.compress(FLOWS.encode())[:-20], FLOWS.encode()],
    ids=["not compressed", "empty", "cut off", "plain"],
)
def test_a_damaged_compressed_file_is_told(content: bytes, case: Path, call: Any) -> None:
    (case / "flows.csv").unlink()
    (case / "flows.csv.gz").write_bytes(content)
    done = call("network", str(case))
    assert done.status == 2 and "case/flows.csv.gz: is " in done.err and "Traceback" not in done.err


def test_a_case_that_is_not_there_is_told(case: Path, call: Any) -> None:
    assert "nowhere: there is no such folder" in call("network", "nowhere").err
    assert "is not a folder" in call("network", "case/links.csv").err
    (case / "links.csv").unlink()
    done = call("network", "case")
    assert done.status == 2 and "case/links.csv: there is no such file, nor links.csv.gz" in done.err


def test_a_file_that_unpacks_without_end_is_refused(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clustersim.trace.csv.MOST_BYTES", 1 << 20)
    (case / "flows.csv").unlink()
    (case / "flows.csv.gz").write_bytes(gzip.compress(b"0" * (9 << 20)))
    with pytest.raises(ClustersimError, match=r"flows\.csv\.gz: is too large; at most 1,048,576 bytes"):
        read_case(case)


@pytest.mark.parametrize(("limit", "said"), [("MOST_ROWS", "4 rows"), ("MOST_IDS", "3 ids in lists")])
def test_tables_too_large_for_memory_are_refused(
    limit: str, said: str, case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"clustersim.trace.csv.{limit}", 2)
    with pytest.raises(ClustersimError, match=f"flows.csv: holds {said}|links.csv: holds {said}"):
        read_case(case)


def test_paths_too_large_for_memory_are_refused(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clustersim.study.traffic.MOST_CELLS", 5)
    with pytest.raises(ClustersimError, match="3 flows with paths of up to 2 links do not fit into memory"):
        read_case(case)


def test_a_mistake_beside_a_very_long_list_is_told(case: Path, call: Any) -> None:
    long = ";".join(["0"] * 100_000)
    put(case, flows=FLOWS + f"10,0,1,-5,0,{long},0\n" + f"11,0,1,x,0,{long},0\n")
    assert call("network", str(case)).err.startswith('case/flows.csv: row 6, bytes: "x"')
    put(case, flows=FLOWS + f"10,0,1,-5,0,{long},0\n")
    assert call("network", str(case)).err.startswith('case/flows.csv: row 5, bytes: "-5"')


_ANYTHING = st.one_of(
    st.binary(max_size=200),
    st.text(alphabet='0123456789;,."-+eE \n\r\tnaif\x00é', max_size=120).map(str.encode),
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(["links", "flows"]), content=_ANYTHING, head=st.booleans())
def test_no_content_is_met_with_a_fault_of_ours(case: Path, file: str, content: bytes, head: bool) -> None:
    good = {"links": LINKS, "flows": FLOWS}
    before = good[file].splitlines()[0].encode() + b"\n" if head else b""
    _try(put(case, **{**good, file: before + content}))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(["links", "flows"]),
    at=st.integers(0, 150),
    gone=st.integers(0, 12),
    new=st.one_of(_ANYTHING, st.sampled_from([b"-1", b"nan", b'"', b";", b"1e308", b"0", b"9" * 25, b"7;7"])),
)
def test_no_change_of_a_good_file_is_met_with_a_fault_of_ours(
    case: Path, file: str, at: int, gone: int, new: bytes
) -> None:
    good = {"links": LINKS.encode(), "flows": FLOWS.encode()}
    content = good[file]
    _try(put(case, **{**good, file: content[:at] + new[:20] + content[at + gone :]}))


def _try(case: Path) -> None:
    """Either the case is told to be wrong, or every flow ends."""
    try:
        found = replay_case(case)
    except ClustersimError as error:
        assert all(line.isprintable() for line in str(error).split("\n"))
        return
    assert np.isfinite(found.finish).all() and (found.finish >= found.release).all()


# --- what is written and printed -----------------------------------------------------------------


def test_the_times_are_written_in_the_order_of_the_flows(case: Path, call: Any) -> None:
    done = call("network", "case", "--out", "finish.csv")
    assert done.status == 0 and done.err == "" and "Times: finish.csv" in done.out
    text = Path("finish.csv").read_text("utf-8")
    assert text.splitlines()[0] == "flow_id,release_us,finish_us"
    assert list(times(text)) == [0, 5, 9]
    assert call("network", "case", "--out", "-").out == text
    assert left_in(case.parent) == ["case", "finish.csv"]
    assert Path("finish.csv").stat().st_mode & 0o777 == (case / "flows.csv").stat().st_mode & 0o777


def test_a_compressed_answer_is_the_same_and_always_the_same_bytes(case: Path, call: Any) -> None:
    for name in ("one.csv.gz", "two.csv.gz"):
        assert call("network", "case", "--out", name).status == 0
    one = Path("one.csv.gz").read_bytes()
    assert one == Path("two.csv.gz").read_bytes()
    assert gzip.decompress(one).decode() == call("network", "case", "--out", "-").out


def test_an_older_answer_is_replaced_and_a_link_followed(case: Path, call: Any) -> None:
    Path("finish.csv").write_text("old", encoding="utf-8")
    Path("here.csv").symlink_to("finish.csv")
    assert call("network", "case", "--out", "here.csv").status == 0
    assert Path("here.csv").is_symlink() and Path("finish.csv").read_text("utf-8").startswith("flow_id")


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("case", "case: is a folder; name a file in it"),
        ("nowhere/finish.csv", "nowhere/finish.csv: cannot be written"),
        ("case/flows.csv/finish.csv", "cannot be written"),
        ("case/flows.csv", "case/flows.csv: is a file of the case itself"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(
    out: str, said: str, case: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clustersim.study.network.read_case", None)
    done = call("network", "case", "--out", out)
    assert done.status == 2 and said in done.err and "Traceback" not in done.err
    assert left_in(case.parent) == ["case"] and (case / "flows.csv").read_text("utf-8") == FLOWS


def test_a_device_is_written_to_and_not_replaced(case: Path, call: Any) -> None:
    assert call("network", "case", "--out", "/dev/null").status == 0
    assert Path("/dev/null").is_char_device()


def test_an_interruption_while_writing_leaves_nothing(
    case: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    assert call("network", "case", "--out", "finish.csv").status == 130
    assert left_in(case.parent) == ["case"]


def test_the_summary_says_how_long_it_took_and_what_was_slow_and_full(case: Path, call: Any) -> None:
    done = call("network", "case")
    assert done.status == 0 and done.err == ""
    for said in ("3 flows, 1.75 MB, over 3 links; model: fluid", "44 us", "slowdown", "slow ", "--out FILE"):
        assert said in done.out, said
    assert max(map(len, done.out.splitlines())) <= 100
    found = json.loads(call("network", "case", "--json").out)
    assert found["flows"] == 3 and found["makespan"] == pytest.approx(44e-6, rel=1e-6)
    slowest = found["slowest"][0]
    assert (slowest["flow"], slowest["src"], slowest["dst"]) == (0, "0", "1")
    assert slowest["duration"] == pytest.approx(32e-6, rel=1e-6)
    assert slowest["alone"] == pytest.approx(22e-6)
    # 1.5 MB over 50 GB/s are 30 of the 44 us.
    assert (found["busiest"][0]["name"], found["busiest"][0]["bytes"]) == ("out", 1.5e6)
    assert found["busiest"][0]["utilization"] == pytest.approx(30 / 44, rel=1e-6)


def test_names_from_files_do_not_steer_the_terminal(case: Path, call: Any) -> None:
    put(case, links=LINKS.replace("out", "\x1b[31m[bold]" + "o" * 300))
    out = call("network", "case").out
    assert "\x1b" not in out and "\\x1b[31m[bold]ooo" in out and max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--fidelity", "fluids"), "'fluids' is not one of 'fluid', 'chunked', 'port_bound'"),
        (("--chunk", "0 B"), "--chunk: 0 B is too small"),
        (("--chunk", "12"), '"12" has no unit'),
        (("--tolerance", "-1"), "--tolerance"),
        (("--tolerance", "nan"), "--tolerance"),
        (("--tolerance", "0.01", "--fidelity", "chunked"), "--tolerance: is for fidelity fluid"),
        (("--json", "--out", "-"), "both want standard output"),
        (("--fidelity", "chunked", "--chunk", "0.001 B"), "chunks would cross links"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_told(
    arguments: tuple[str, ...], said: str, case: Path, call: Any
) -> None:
    done = call("network", "case", *arguments)
    assert done.status == 2 and done.out == "" and said in done.err and "Traceback" not in done.err


def test_the_models_differ_as_they_should(case: Path, call: Any) -> None:
    finish = {
        fidelity: times(call("network", "case", "--fidelity", fidelity, "--chunk", "1 kB", "--out", "-").out)
        for fidelity in NETWORKS
    }
    # Nobody else's flows count for the port bound: 2 us, and 1 MB at 50 GB/s.
    assert finish["port_bound"][0] == pytest.approx((0, 22), rel=1e-6)
    assert finish["chunked"][0][1] == pytest.approx(32, rel=0.01)
    assert finish["chunked"][0][1] != finish["fluid"][0][1]


@given(st.lists(st.floats(1e-12, 1e15), min_size=1, max_size=20))
def test_numbers_are_written_so_that_they_read_back(values: list[float]) -> None:
    lines = to_csv({"x": np.array(values)}).decode().splitlines()[1:]
    assert np.array([float(line) for line in lines]) == pytest.approx(values, rel=1e-15, abs=0)
