"""Exports: what stands in a timeline is what stands in the trace, read back by others' libraries."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists, tuples
from inspected import opened, small
from scenarios import parallel

from clustersim.analysis.chosen import Chosen, part_of
from clustersim.analysis.latency import numbers, words
from clustersim.analysis.timeline_gpus import arrows_of, laid, stream_slices
from clustersim.analysis.timeline_links import homes
from clustersim.analysis.timeline_parts import lanes, nanoseconds, spelled, steps_of
from clustersim.cli import _status
from clustersim.errors import ClustersimError, ResultError
from clustersim.report import protobuf
from clustersim.study import exporting
from clustersim.study.exporting import Wanted, export
from clustersim.study.inspecting import Opened, open_result
from clustersim.study.views import Times
from clustersim.trace.record import Text, Trace
from clustersim.units import show

LEVELS = ("spans", "flows")
#: Results that older versions left.
STORED = Path(__file__).parent / "stored"
#: Two stages that pass on micro-batches, so that there are transfers.
STAGES = {"deployment": parallel(tp=1, dp=2, pp=2), "workload": {"decode_steps": 2, "microbatches": 2}}


@dataclass
class Slice:
    """One slice as it was read back. Times in ns."""

    track: str
    category: str
    name: str
    start: int
    end: int
    about: dict[str, Any]
    leaving: list[int] = field(default_factory=list)
    ending: list[int] = field(default_factory=list)


@dataclass
class Read:
    """A timeline as it was read back. counters: name of the track → times in ns and values."""

    slices: list[Slice]
    counters: dict[str, list[tuple[int, float]]]
    tracks: dict[int, Any]
    units: dict[str, str]


@pytest.fixture(scope="module", params=LEVELS)
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(tmp_path_factory.mktemp("results"), small(request.param))


@pytest.fixture(scope="module", params=LEVELS)
def staged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(tmp_path_factory.mktemp("results"), small(request.param, **STAGES))


def read_perfetto(path: Path) -> Read:
    """By Perfetto's own definitions; a slice that does not end on its track, or not in turn, fails."""
    proto = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    trace = proto.Trace()
    trace.ParseFromString(content)
    known: dict[str, dict[int, str]] = {}
    tracks: dict[int, Any] = {}
    events = []
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == 1
        for kind, entries in packet.interned_data.ListFields():
            held = ((e.iid, e.str.decode() if hasattr(e, "str") else e.name) for e in entries)
            known.setdefault(kind.name, {}).update(held)
        if packet.HasField("track_descriptor"):
            one = packet.track_descriptor
            assert one.uuid not in tracks and (not one.parent_uuid or one.parent_uuid in tracks)
            tracks[one.uuid] = one
        if packet.HasField("track_event"):
            events.append((packet.timestamp, len(events), packet.track_event))
    open_: dict[int, list[Slice]] = defaultdict(list)
    read = Read([], defaultdict(list), tracks, {})
    for time, _, event in sorted(events, key=lambda one: one[:2]):
        track = tracks[event.track_uuid]
        if event.type == event.TYPE_COUNTER:
            read.counters[track.name].append((time, event.double_counter_value))
            unit = track.counter.unit_name or track.counter.Unit.Name(track.counter.unit)
            read.units[track.name] = unit
        elif event.type == event.TYPE_SLICE_BEGIN:
            about = dict(_annotations(event, known))
            category = known["event_categories"][event.category_iids[0]]
            one = Slice(track.name, category, known["event_names"][event.name_iid], time, -1, about)
            one.leaving, one.ending = list(event.flow_ids), list(event.terminating_flow_ids)
            open_[event.track_uuid].append(one)
        else:
            one = open_[event.track_uuid].pop()
            one.end = time
            one.ending += event.terminating_flow_ids
            assert not event.flow_ids
            read.slices.append(one)
    assert not any(open_.values())
    return read


def _annotations(event: Any, known: dict[str, dict[int, str]]) -> Iterator[tuple[str, Any]]:
    for one in event.debug_annotations:
        name = known["debug_annotation_names"][one.name_iid]
        if one.string_value_iid:
            yield name, known["debug_annotation_string_values"][one.string_value_iid]
        else:
            yield name, getattr(one, one.WhichOneof("value"))


def exported(result: Opened, folder: Path, **wanted: Any) -> Read:
    path = folder / "drawn.pftrace"
    export(result, Wanted(**wanted), path)
    return read_perfetto(path)


def spans(result: Opened, *columns: str) -> list[np.ndarray]:
    table = result.trace.tables["spans"]
    return [words(table, c) if c in ("operator", "kind", "stream") else numbers(table, c) for c in columns]


def gpu_names(result: Opened) -> np.ndarray:
    return words(result.trace.tables["ranks"], "gpu")


# ---- what is drawn ------------------------------------------------------------------------------


def test_slices_of_gpus_are_the_spans_with_their_waits(staged: Opened, tmp_path: Path) -> None:
    read = exported(staged, tmp_path)
    drawn = sorted(
        (s.track, s.start, s.end, s.name) for s in read.slices if s.category in ("compute", "exchange")
    )
    waits = sorted((s.track, s.start, s.end, s.about["before"]) for s in read.slices if s.category == "wait")
    rank, stream, operator, *times = spans(staged, "rank", "stream", "operator", "start", "met", "end")
    start, met, end = (nanoseconds(time).tolist() for time in times)
    tracks = [f"{gpu} {name}" for gpu, name in zip(gpu_names(staged)[rank], stream, strict=True)]
    assert drawn == sorted(zip(tracks, met, end, operator, strict=True))
    rows = [row for row in zip(tracks, start, met, operator, strict=True) if row[2] > row[1]]
    assert waits == sorted(rows)
    assert any("transfer" in track for track in tracks)
    # Rounding moves each time by half a nanosecond at most.
    took = sum(s.end - s.start for s in read.slices if s.category in ("compute", "exchange", "wait"))
    assert abs(took * 1e-9 - (times[2] - times[0]).sum()) <= len(rank) * 1e-9


def test_slices_of_a_track_follow_each_other(result: Opened, tmp_path: Path) -> None:
    last: dict[str, int] = {}
    for one in sorted(exported(result, tmp_path).slices, key=lambda one: (one.start, one.end)):
        if one.track.endswith(("compute", "transfer")):
            assert one.start >= last.get(one.track, 0)
            last[one.track] = one.end


def test_slices_tell_layer_step_tokens_and_the_narrowest_link(result: Opened, tmp_path: Path) -> None:
    read = exported(result, tmp_path)
    trace = result.trace
    passes, experts = trace.tables["token_batches"], trace.tables["experts"]
    step = dict(zip(numbers(passes, "token_batch").tolist(), numbers(passes, "step").tolist(), strict=True))
    for one in (s for s in read.slices if s.category in ("compute", "exchange")):
        assert one.about["step"] == step[one.about["token batch"]]
        assert ("narrowest link" in one.about) <= (one.category == "exchange")
    assert sum("narrowest link" in one.about for one in read.slices) == len(
        numbers(trace.tables["span_links"], "span")
    )
    own = sum(one.about.get("bytes of this GPU on it", 0.0) for one in read.slices)
    assert own == pytest.approx(numbers(trace.tables["span_links"], "own").sum())
    served = {
        (one.track, one.about["token batch"], one.about["layer"]): one.about["tokens for its experts"]
        for one in read.slices
        if "tokens for its experts" in one.about
    }
    assert sum(served.values()) == numbers(experts, "tokens").sum()


# ---- arrows -------------------------------------------------------------------------------------


def ends_of(read: Read) -> list[tuple[Slice, Slice]]:
    """Both slices of every arrow; fails where one end is missing or stands twice."""
    leaving = [(number, one) for one in read.slices for number in one.leaving]
    ending = [(number, one) for one in read.slices for number in one.ending]
    assert len(dict(leaving)) == len(leaving) and len(dict(ending)) == len(ending)
    assert dict(leaving).keys() == dict(ending).keys()
    return [(one, dict(ending)[number]) for number, one in leaving]


def test_arrows_have_two_ends_and_go_forward(staged: Opened, tmp_path: Path) -> None:
    arrows = ends_of(exported(staged, tmp_path))
    assert arrows
    for source, target in arrows:
        assert source.track != target.track
        assert source.start < target.end


def test_without_flows_an_arrow_comes_from_what_released_the_other(tmp_path: Path) -> None:
    result = opened(tmp_path, small("spans", **STAGES))
    arrows = ends_of(exported(result, tmp_path))
    assert {target.start - source.end for source, target in arrows} == {0}
    span, after, rank, stream = spans(result, "span", "after", "rank", "stream")
    place = dict(zip(span.tolist(), zip(rank.tolist(), stream, strict=True), strict=True))
    elsewhere = [number for number, before in zip(span, after, strict=True) if before >= 0]
    pairs = zip(elsewhere, after[after >= 0], strict=True)
    assert len(arrows) == sum(place[number] != place[before] for number, before in pairs)
    waits = [one for one in exported(result, tmp_path).slices if one.category == "wait"]
    assert waits and {one.about["waited for"] for one in waits} <= set(gpu_names(result))


def test_with_flows_an_arrow_joins_every_sender_and_receiver(tmp_path: Path) -> None:
    result = opened(tmp_path, small("flows", **STAGES))
    arrows = ends_of(exported(result, tmp_path))
    drawn = {
        (a.about["token batch"], a.name, a.about.get("layer", -1), a.track.split()[0], b.track.split()[0])
        for a, b in arrows
        if a.category == "exchange"
    }
    flows = result.trace.tables["flows"]
    names = gpu_names(result)
    sent = zip(
        numbers(flows, "token_batch").tolist(),
        words(flows, "operator"),
        numbers(flows, "layer").tolist(),
        names[numbers(flows, "source")],
        names[numbers(flows, "target")],
        strict=True,
    )
    assert drawn == {row for row in sent if row[3] != row[4]}


def test_of_too_many_arrows_those_of_the_last_flow_to_each_remain(tmp_path: Path) -> None:
    trace = opened(tmp_path, small("flows", workload={"decode_steps": 1})).trace
    part = part_of(trace, Chosen())
    placed = laid(trace, part)
    slices, own = stream_slices(trace, placed, {place: n for n, place in enumerate(placed.places)})
    every = arrows_of(trace, part.rows, slices, own, most=1_000_000)
    few = arrows_of(trace, part.rows, slices, own, most=1)
    assert set(few.target.tolist()) == set(every.target.tolist())
    assert len(set(few.target.tolist())) == len(few) == len(every) - few.left < len(every)
    spans_, flows = trace.tables["spans"], trace.tables["flows"]
    at = dict(zip(own.tolist(), part.rows.tolist(), strict=True))
    for source, target in zip(few.source.tolist(), few.target.tolist(), strict=True):
        sender, row = at[source], at[target]
        same = (words(flows, "operator") == words(spans_, "operator")[row]) & (
            numbers(flows, "target") == numbers(spans_, "rank")[row]
        )
        for column in ("token_batch", "layer"):
            same &= numbers(flows, column) == numbers(spans_, column)[row]
        last = numbers(flows, "end") == numbers(flows, "end")[same].max()
        assert numbers(spans_, "rank")[sender] in numbers(flows, "source")[same & last]


# ---- counters -----------------------------------------------------------------------------------


def area(points: list[tuple[int, float]], end: float) -> float:
    """Value x seconds of a step function until the end, s."""
    time = np.array([*(time * 1e-9 for time, _ in points), end])
    return float((np.diff(time) * np.array([value for _, value in points])).sum())


def test_link_counters_bring_the_bytes_that_links_carried(result: Opened, tmp_path: Path) -> None:
    read, trace = exported(result, tmp_path), result.trace
    links, end = trace.tables["links"], float(trace.facts["simulated_seconds"])
    use = {name: points for name, points in read.counters.items() if name.endswith(" use")}
    assert {read.units[name] for name in use} == {"%"}
    carried = 0.0
    for source, target, bandwidth, size in zip(
        words(links, "source"), words(links, "target"), *(numbers(links, n) for n in ("bandwidth", "bytes")),
        strict=True,
    ):  # fmt: skip
        name = " → ".join(vertex.rpartition("/")[2] for vertex in (source, target)) + " use"
        if name in use and source.startswith("gpu"):
            # Both ends of an interval are rounded to a nanosecond.
            rounding = 1e-9 * sum(value for _, value in use[name]) / 100 * bandwidth
            assert area(use[name], end) / 100 * bandwidth == pytest.approx(size, abs=rounding)
            carried += size
    assert carried > 0
    values = {value for points in use.values() for _, value in points}
    table = trace.tables["link_use"]
    start, until = numbers(table, "start"), np.minimum(numbers(table, "end"), end)
    share = numbers(table, "bytes") / (until - start) / numbers(links, "bandwidth")[numbers(table, "link")]
    assert {round(100 * one, 6) for one in share.tolist()} == {round(v, 6) for v in values} - {0.0}


def test_queue_counters_have_the_token_seconds_of_the_queues(result: Opened, tmp_path: Path) -> None:
    read, experts = exported(result, tmp_path), result.trace.tables["experts"]
    end = float(result.trace.facts["simulated_seconds"])
    names = gpu_names(result)
    for rank in np.unique(numbers(experts, "rank")).tolist():
        wait = numbers(experts, "wait")[numbers(experts, "rank") == rank].sum()
        points = read.counters[f"{names[rank]} tokens in expert queues"]
        assert area(points, end) == pytest.approx(wait, rel=1e-3)
        assert points[-1][1] == 0.0 and min(value for _, value in points) >= 0.0


def test_kv_counters_are_the_table(result: Opened, tmp_path: Path) -> None:
    read, table = exported(result, tmp_path), result.trace.tables["kv_use"]
    for shard in np.unique(numbers(table, "shard")).tolist():
        mine = numbers(table, "shard") == shard
        rows = dict(
            zip(nanoseconds(numbers(table, "time")[mine]), numbers(table, "bytes")[mine], strict=True)
        )
        assert dict(read.counters[f"KV memory of shard {shard}"]) == rows
        assert read.units[f"KV memory of shard {shard}"] == "UNIT_SIZE_BYTES"


@given(lists(tuples(integers(0, 3), integers(0, 50), integers(0, 9)), max_size=40), integers(0, 50))
def test_a_window_begins_with_what_held_before_it(points: list[tuple[int, int, int]], begin: int) -> None:
    track, time, value = (np.array([p[n] for p in points], dtype=np.int64) for n in range(3))
    window = (begin * 1e-9, 50e-9)
    found = steps_of(track, time * 1e-9, value.astype(float), window)
    rows = list(zip(found.track.tolist(), found.time.tolist(), found.value.tolist(), strict=True))

    def held(one: int, now: int, events: list[tuple[int, int, Any]]) -> Any:
        before = [(time, at) for at, (track, time, _) in enumerate(events) if track == one and time <= now]
        return events[max(before)[1]][2] if before else None

    assert len({row[:2] for row in rows}) == len(rows)
    for one in range(4):
        for now in range(begin, 51):
            assert held(one, now, rows) == held(one, now, points)


# ---- where things stand -------------------------------------------------------------------------


def test_tracks_stand_under_their_server_in_the_order_of_ranks(result: Opened, tmp_path: Path) -> None:
    tracks = exported(result, tmp_path).tracks
    top = next(track for track in tracks.values() if not track.parent_uuid)
    assert top.name == result.trace.facts["name"]
    assert all(track.child_ordering == track.EXPLICIT for track in tracks.values())
    below = sorted(
        (t for t in tracks.values() if t.parent_uuid == top.uuid), key=lambda t: t.sibling_order_rank
    )
    servers = [track for track in below if track.name.startswith("server")]
    assert [track.name for track in servers] == ["server 0", "server 1"]
    ranks = result.trace.tables["ranks"]
    for number, server in enumerate(servers):
        mine = words(ranks, "gpu")[numbers(ranks, "server") == number].tolist()
        inside = [t for t in tracks.values() if t.parent_uuid == server.uuid]
        streams = sorted((t.sibling_order_rank, t.name) for t in inside if t.name.endswith(" compute"))
        assert [name for _, name in streams] == [f"{gpu} compute" for gpu in mine]


def test_a_link_stands_with_the_server_of_an_end_and_else_with_the_network() -> None:
    ends = [
        ("a", "box/switch"),
        ("box/switch", "b"),
        ("b", "box/card"),
        ("box/card", "leaf"),
        ("leaf", "spine"),
    ]
    ends += [("c", "wide"), ("wide", "a"), ("wide", "spine")]
    links = {"source": spelled([a for a, _ in ends]), "target": spelled([b for _, b in ends])}
    ranks = {"gpu": spelled(["a", "b", "c"]), "server": np.array([0, 0, 7])}
    # A switch beside GPUs of two servers is in neither.
    assert homes(Trace({"links": links, "ranks": ranks}, {})).tolist() == [0, 0, 0, 0, -1, 7, 0, -1]


def test_links_show_the_exchanges_for_which_they_were_narrowest(result: Opened, tmp_path: Path) -> None:
    table, rows = result.trace.tables["span_links"], spans(result, "span", "met", "end")
    of = np.argsort(rows[0])[np.searchsorted(np.sort(rows[0]), numbers(table, "span"))]
    about = [column[of].tolist() for column in spans(result, "token_batch", "operator", "layer", "stage")]
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(numbers(table, "link").tolist(), *about, strict=True)):
        groups[key].append(row)
    met, end = (nanoseconds(column[of]) for column in rows[1:])
    expected = sorted(
        (key[2], met[held].min(), end[held].max(), numbers(table, "all")[held[0]])
        for key, held in groups.items()
    )
    drawn = [one for one in exported(result, tmp_path).slices if one.category == "exchange on link"]
    assert sorted((one.name, one.start, one.end, one.about["bytes"]) for one in drawn) == expected


def test_a_link_that_is_down_says_so(tmp_path: Path) -> None:
    kinds = {"kind": "down_link", "link": "server0/nic0->pod0/rail0/leaf", "start": "1 us", "end": "3 us"}
    result = opened(tmp_path, small("spans", faults=[kinds]))
    found = [one for one in exported(result, tmp_path).slices if one.category == "outage"]
    assert [(one.name, one.start, one.end) for one in found] == [("down", 1000, 3000)]
    faults = [one for one in exported(result, tmp_path).slices if one.category == "faults"]
    assert [(one.start, one.end) for one in faults] == [(1000, 3000)]


@given(lists(tuples(integers(0, 2), integers(0, 20), integers(0, 9)), max_size=30))
def test_slices_in_one_lane_do_not_overlap(parts: list[tuple[int, int, int]]) -> None:
    place, start, took = (np.array([p[n] for p in parts], dtype=np.int64) for n in range(3))
    found = lanes(place, start, start + took)
    for a in range(len(parts)):
        for b in range(a):
            if (place[a], found[a]) == (place[b], found[b]):
                first, second = sorted((a, b), key=lambda n: (start[n], start[n] + took[n]))
                assert start[first] + took[first] <= start[second]
    if len(parts):
        assert found.max() < len(parts)


# ---- formats ------------------------------------------------------------------------------------


def test_chrome_json_holds_the_same(staged: Opened, tmp_path: Path) -> None:
    read = exported(staged, tmp_path)
    path = tmp_path / "drawn.json"
    found = export(staged, Wanted(), path)
    assert found["format"] == "chrome"
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    process = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert {"server 0", "server 1"} <= set(process.values())

    def ns(micro: float) -> int:
        return round(micro * 1000)

    drawn = [e for e in events if e["ph"] == "X"]
    rows = sorted(
        (e["cat"], e["name"], ns(e["ts"]), ns(e["ts"]) + ns(e["dur"]), json.dumps(e["args"])) for e in drawn
    )
    assert rows == sorted((s.category, s.name, s.start, s.end, json.dumps(s.about)) for s in read.slices)
    gpus = {names[e["tid"]] for e in drawn if e["cat"] == "compute"}
    assert gpus == {s.track for s in read.slices if s.category == "compute"}
    arrows = ends_of(read)
    sent = {e["id"]: ns(e["ts"]) for e in events if e["ph"] == "s"}
    came = {e["id"]: ns(e["ts"]) for e in events if e["ph"] == "f"}
    assert sent.keys() == came.keys() and len(sent) == len(arrows) == found["arrows"]
    assert all(sent[number] <= came[number] for number in sent)
    points = [e for e in events if e["ph"] == "C"]
    assert len(points) == sum(map(len, read.counters.values())) == found["points"]


def test_csv_is_the_tables(result: Opened, tmp_path: Path) -> None:
    found = export(result, Wanted("csv"), tmp_path / "tables")
    for table, columns in result.trace.tables.items():
        with (tmp_path / "tables" / f"{table}.csv").open(newline="") as file:
            header, *rows = list(csv.reader(file))
        assert header == list(columns)
        assert len(rows) == found["rows"][table] == len(next(iter(columns.values())))
    with (tmp_path / "tables" / "spans.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    start, operator = spans(result, "start", "operator")
    assert [float(row["start"]) for row in read] == start.tolist()
    assert [row["operator"] for row in read] == operator.tolist()


@pytest.mark.parametrize("name", ["a.pftrace", "a.pftrace.gz", "a.json", "a.json.gz"])
def test_the_same_result_gives_the_same_bytes(result: Opened, tmp_path: Path, name: str) -> None:
    export(result, Wanted(), tmp_path / name)
    first = (tmp_path / name).read_bytes()
    (tmp_path / "other").mkdir()
    export(result, Wanted(), tmp_path / "other" / name)
    assert (tmp_path / "other" / name).read_bytes() == first


@given(lists(integers(0, 2**63 - 1)))
def test_columns_of_varints_are_varints(values: list[int]) -> None:
    found = protobuf.varints(np.array(values, dtype=np.int64))
    assert found.flat().tobytes() == b"".join(map(protobuf.varint, values))
    assert found.lengths().tolist() == [len(protobuf.varint(value)) for value in values]


@given(integers(0, 2**64 - 1))
def test_a_varint_has_seven_bits_a_byte(value: int) -> None:
    digits = protobuf.varint(value)
    assert sum((digit & 0x7F) << 7 * place for place, digit in enumerate(digits)) == value
    assert [digit >> 7 for digit in digits] == [1] * (len(digits) - 1) + [0]
    assert len(digits) == max(1, -(-value.bit_length() // 7))


# ---- what is chosen -----------------------------------------------------------------------------


def test_of_too_many_spans_those_that_start_first_are_kept(result: Opened, tmp_path: Path) -> None:
    start, met = spans(result, "start", "met")
    path = tmp_path / "few.pftrace"
    found = export(result, Wanted(most=50), path)
    assert found["spans"] == 50
    assert f"left out {len(start) - 50} of {len(start)} spans" in found["notes"][0]
    assert "--gpus" in found["notes"][0] and "--most" in found["notes"][0]
    drawn = [s for s in read_perfetto(path).slices if s.category in ("compute", "exchange")]
    assert len(drawn) == 50
    assert sorted(s.start for s in drawn) == sorted(nanoseconds(met[np.argsort(start, kind="stable")[:50]]))


def test_gpus_steps_and_times_choose(result: Opened, tmp_path: Path) -> None:
    trace = result.trace
    rank, batch, start, end = spans(result, "rank", "token_batch", "start", "end")
    passes = trace.tables["token_batches"]
    second = np.isin(batch, numbers(passes, "token_batch")[numbers(passes, "step") == 1])
    half = float(trace.facts["simulated_seconds"]) / 2
    gpu = gpu_names(result)[3]
    chosen = {
        "all": (Wanted(), np.ones(len(rank), dtype=bool)),
        "gpus": (Wanted(gpus=("0-1", gpu)), np.isin(rank, [0, 1, 3])),
        "steps": (Wanted(steps=("1",)), second),
        "window": (Wanted(times=Times(end=f"{half!r} s")), start < half),
        "both": (Wanted(gpus=("2",), times=Times(f"{half!r} s")), (rank == 2) & (end > half)),
    }
    for name, (wanted, rows) in chosen.items():
        assert export(result, wanted, tmp_path / "a.pftrace")["spans"] == rows.sum() > 0, name
        tables = export(result, Wanted("csv", wanted.times, wanted.gpus, wanted.steps), tmp_path / "t")
        assert tables["rows"]["spans"] == rows.sum()


def test_of_chosen_steps_no_other_is_drawn(staged: Opened, tmp_path: Path) -> None:
    read = exported(staged, tmp_path, steps=("1",))
    assert {one.about["step"] for one in read.slices if "step" in one.about} == {1}
    assert sum(one.category == "steps" for one in read.slices) == 1


def test_a_window_holds_nothing_of_steps_outside(result: Opened, tmp_path: Path) -> None:
    half = float(result.trace.facts["simulated_seconds"]) / 2
    read = exported(result, tmp_path, times=Times(end=f"{half!r} s"))
    cut = nanoseconds(np.array([half]))[0]
    for one in read.slices:
        assert one.start <= cut
        if one.category in ("run", "steps", "token batches"):
            assert one.end <= cut
    assert max(time for points in read.counters.values() for time, _ in points) <= cut


def test_without_spans_there_is_no_timeline_but_there_are_tables(tmp_path: Path) -> None:
    result = opened(tmp_path, small("sums"))
    for name in ("a.pftrace", "a.json"):
        with pytest.raises(ResultError, match=r"no spans were recorded.*trace\.level=spans"):
            export(result, Wanted(), tmp_path / name)
        assert not (tmp_path / name).exists()
    found = export(result, Wanted("csv"), tmp_path / "tables")
    assert found["spans"] == 0 and found["rows"]["sums"] > 0
    assert "trace.level=spans" in found["notes"][0]


def test_what_was_not_recorded_is_said(result: Opened, tmp_path: Path) -> None:
    tables, facts = result.trace.tables, result.trace.facts
    half = float(facts["simulated_seconds"]) / 2
    late = numbers(tables["spans"], "end") > half
    some = {
        name: Text(c.codes[late], c.words) if isinstance(c, Text) else c[late]
        for name, c in tables["spans"].items()
    }
    told = Trace({**tables, "spans": some}, {**facts, "recorded": [half, 2 * half]})
    partly = replace(result, trace=told)
    (note,) = export(partly, Wanted(), tmp_path / "a.pftrace")["notes"]
    assert note.startswith(f"spans were recorded from {show(half, 'time')} to ")
    assert not export(partly, Wanted(times=Times(f"{half!r} s")), tmp_path / "a.pftrace")["notes"]


def test_a_result_of_an_older_version_says_what_it_lacks(tmp_path: Path) -> None:
    result = open_result(str(STORED / "v3"))
    (note,) = export(result, Wanted(), tmp_path / "a.pftrace")["notes"]
    assert "older version" in note
    drawn = [s for s in read_perfetto(tmp_path / "a.pftrace").slices if s.category in ("compute", "exchange")]
    assert len(drawn) == len(numbers(result.trace.tables["spans"], "span"))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted("perfeto"), '--format: "perfeto" is not known (did you mean "perfetto"?)'),
        (Wanted(gpus=("9",)), "--gpus: there is no rank 9 (the nearest is 3)"),
        (Wanted(gpus=("gpux",)), "--gpus: there is no GPU"),
        (Wanted(gpus=("3-1",)), "--gpus: 3-1 is empty; write 1-3"),
        (Wanted(steps=("0-2",)), "--steps: there is no step 2; there is 0 to 1"),
        (Wanted(steps=("one",)), "--steps: there is no step one"),
        (Wanted(times=Times("1")), '--from: "1" has no unit'),
    ],
)
def test_wrong_wishes_are_answered_and_nothing_is_written(
    result: Opened, tmp_path: Path, wanted: Wanted, said: str
) -> None:
    with pytest.raises(ClustersimError) as error:
        export(result, wanted, tmp_path / "a.pftrace")
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_result_is_not_written_into(result: Opened) -> None:
    before = sorted(result.folder.rglob("*"))
    for place in (result.folder / "a.pftrace", result.folder / "trace" / "spans.parquet", result.folder):
        with pytest.raises(ResultError, match="lies in the result"):
            export(result, Wanted(), place)
    assert sorted(result.folder.rglob("*")) == before


def test_a_failure_leaves_what_was_there(
    result: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(timeline: Any) -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("broken")

    monkeypatch.setattr(exporting, "FORMATS", {"perfetto": exporting._drawn(broken)})
    (tmp_path / "a.pftrace").write_bytes(b"old")
    with pytest.raises(RuntimeError):
        export(result, Wanted(), tmp_path / "a.pftrace")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pftrace"]
    assert (tmp_path / "a.pftrace").read_bytes() == b"old"


def test_tables_replace_tables_and_nothing_else(result: Opened, tmp_path: Path) -> None:
    place = tmp_path / "tables"
    export(result, Wanted("csv"), place)
    export(result, Wanted("csv", most=3), place)
    assert len((place / "spans.csv").read_text().splitlines()) == 4
    (place / "mine.txt").write_text("mine")
    with pytest.raises(ResultError, match=r"mine\.txt"):
        export(result, Wanted("csv"), place)
    assert (place / "mine.txt").read_text() == "mine"


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def called(
    result: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Any:
    """Calls `clustersim trace` in a folder with a result: exit status, standard output and error."""
    shutil.copytree(result.folder, tmp_path / "results" / result.folder.name)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = _status(["trace", *arguments])
        return status, *capfd.readouterr()

    return call


def test_the_newest_result_goes_into_a_file_of_its_name(called: Any, result: Opened, tmp_path: Path) -> None:
    status, out, err = called("export")
    place = tmp_path / f"{result.folder.name}.pftrace.gz"
    assert (status, err) == (0, "")
    assert place.name in out and "ui.perfetto.dev" in out
    assert any(one.category == "compute" for one in read_perfetto(place).slices)


@pytest.mark.parametrize("before", [True, False])
def test_the_result_stands_before_or_after(called: Any, tmp_path: Path, before: bool) -> None:
    words_ = ["tiny", "export"] if before else ["export", "tiny"]
    status, out, err = called(*words_, "-o", "a.json", "--most", "7", "--json")
    found = json.loads(out)
    assert (status, found["path"], found["format"], found["spans"]) == (0, "a.json", "chrome", 7)
    assert found["bytes"] == (tmp_path / "a.json").stat().st_size
    assert "left out" in err and found["notes"][0] in err


def test_a_wrong_wish_has_status_2_and_leaves_no_file(called: Any, tmp_path: Path) -> None:
    status, out, err = called("export", "--gpus", "0,9")
    assert (status, out) == (2, "")
    assert "--gpus: there is no rank 9" in err
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
