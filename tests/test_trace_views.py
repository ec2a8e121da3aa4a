"""What views say of a run: laws that tie them to each other and to the tables, then a small run as it was."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inspected import opened, small
from pytest import approx
from scenarios import parallel, rail_tree, single_server, trace_of
from scenarios import tiny as scenario_of
from synthetic import tiny as by_hand

from clustersim.analysis import expert_queues, over_time
from clustersim.analysis import stragglers as blame
from clustersim.analysis.latency import numbers, words
from clustersim.analysis.slices import slice_of
from clustersim.analysis.utilization import STATES, gpus
from clustersim.errors import ResultError
from clustersim.study import views
from clustersim.study.inspecting import open_result
from clustersim.study.views import Times
from clustersim.trace import files
from clustersim.trace.record import TABLES, Text, Trace

GOLDEN = Path(__file__).parent / "golden" / "trace_views.json"
STORED = Path(__file__).parent / "stored"

#: Deployments that differ in what GPUs wait for.
KINDS = {
    "experts on two boxes": small("flows"),
    "a pipeline with micro-batches": scenario_of(
        single_server(4),
        deployment=parallel(tp=2, pp=2),
        workload={"microbatches": 2, "decode_steps": 3},
        trace={"level": "flows"},
    ),
    "a slow GPU": scenario_of(
        rail_tree(2, 2),
        deployment=parallel(dp=4),
        faults=[{"kind": "slow_gpu", "gpu": 2, "factor": 3.0}],
        trace={"level": "flows"},
    ),
    "expert by expert, in chunks": scenario_of(
        rail_tree(2, 1, nic=1e7),
        deployment=parallel(dp=2, experts={"service": "by_expert", "start": "chunks", "chunk_tokens": 1}),
        gating={"skew": "zipf"},
        workload={"sequences": 12, "decode_steps": 2},
        trace={"level": "flows"},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def trace(request: pytest.FixtureRequest) -> Trace:
    return trace_of(KINDS[request.param])


# ---- laws: time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 7, 64])
def test_in_every_bin_the_shares_of_every_gpu_add_up_to_one(trace: Trace, bins: int) -> None:
    use = over_time.gpu_use(trace, bins)
    assert use.shares.shape == (len(numbers(trace.tables["ranks"], "rank")), bins, len(STATES))
    assert use.shares.sum(axis=2) == approx(1.0, abs=1e-9)
    assert use.shares.min() >= 0


@pytest.mark.parametrize("bins", [1, 7, 64])
def test_the_mean_over_the_bins_is_the_share_of_the_run_from_its_sums(trace: Trace, bins: int) -> None:
    mean = over_time.gpu_use(trace, bins).shares.mean(axis=1)
    for entry in gpus(trace):
        assert mean[entry["rank"]] == approx([entry[state] for state in STATES], abs=1e-9)


def test_two_halves_of_a_window_hold_what_the_window_holds(trace: Trace) -> None:
    end = trace.facts["simulated_seconds"]
    whole = over_time.gpu_use(trace, 1, (0.2 * end, 0.8 * end)).shares[:, 0]
    halves = over_time.gpu_use(trace, 2, (0.2 * end, 0.8 * end)).shares
    assert halves.mean(axis=1) == approx(whole, abs=1e-9)


@pytest.mark.parametrize("bins", [1, 7, 64])
def test_bytes_over_time_add_up_to_the_bytes_of_every_link(trace: Trace, bins: int) -> None:
    use, table = over_time.link_use(trace, bins), trace.tables["links"]
    order = np.argsort(numbers(table, "link"))
    assert use.bytes.sum(axis=1) == approx(numbers(table, "bytes")[order], rel=1e-9)
    assert use.capacity.sum(axis=1) == approx(numbers(table, "offered")[order], rel=1e-9)
    assert sorted(np.concatenate(list(use.tiers.values())).tolist()) == list(range(len(order)))


def over_links_and_by_flows(trace: Trace) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """float64[R] bytes that left and entered each GPU, by `link_use` and by the flows of its rank."""
    flows, table, ranks = (trace.tables[name] for name in ("flows", "links", "ranks"))
    assert set(words(flows, "via")) == {"peer"}
    carried = over_time.link_use(trace, 5).bytes.sum(axis=1)
    by_link, by_flow = {}, {}
    for side in ("source", "target"):
        link = [numbers(table, "link")[words(table, side) == gpu] for gpu in words(ranks, "gpu")]
        by_link[side] = np.array([carried[here].sum() for here in link])
        by_flow[side] = np.bincount(
            numbers(flows, side), weights=numbers(flows, "wire"), minlength=len(by_link[side])
        )
    return by_link, by_flow


def test_over_its_links_a_gpu_sends_more_than_it_gets_by_what_its_own_flows_do(trace: Trace) -> None:
    # A GPU may relay for others of its box, which adds the same on both sides.
    by_link, by_flow = over_links_and_by_flows(trace)
    assert by_flow["source"].sum() > 0
    net = by_flow["source"] - by_flow["target"]
    assert by_link["source"] - by_link["target"] == approx(net, rel=1e-9, abs=1e-6)
    assert (by_link["source"] >= by_flow["source"] * (1 - 1e-9)).all()


def test_where_nobody_relays_the_bytes_over_links_are_the_bytes_of_the_flows() -> None:
    by_link, by_flow = over_links_and_by_flows(trace_of(KINDS["a pipeline with micro-batches"]))
    for side, sent in by_flow.items():
        assert by_link[side] == approx(sent, rel=1e-9)


@pytest.mark.parametrize("bins", [1, 9])
def test_queue_lengths_over_time_hold_every_token_second(trace: Trace, bins: int) -> None:
    queues = over_time.queue_lengths(trace, bins)
    table = trace.tables["experts"]
    waited = np.bincount(numbers(table, "rank"), weights=numbers(table, "wait"), minlength=len(queues.tokens))
    area = (queues.tokens * np.diff(queues.edges)).sum(axis=1)
    assert area == approx(waited, rel=1e-9, abs=1e-18)


times = st.floats(-2.0, 12.0)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 2), times, times, st.floats(0.0, 3.0)), max_size=12),
    st.integers(1, 9),
)
def test_binning_is_what_a_loop_over_bins_and_intervals_gives(
    intervals: list[tuple[int, float, float, float]], bins: int
) -> None:
    edges = np.linspace(0.0, 10.0, bins + 1)
    expected = np.zeros((3, bins))
    for place, start, end, rate in intervals:
        for b in range(bins):
            expected[place, b] += rate * max(min(end, edges[b + 1]) - max(start, edges[b]), 0.0)
    columns = [np.array(column) for column in zip(*intervals, strict=True)] or [np.empty(0)] * 4
    found = over_time.binned(columns[0].astype(int), *columns[1:], edges, 3)
    assert found == approx(expected, abs=1e-9)


# ---- laws: experts, stragglers, slices -----------------------------------------------------------


def test_the_tokens_of_the_copies_are_all_that_were_sent(trace: Trace) -> None:
    passes, table = trace.tables["token_batches"], trace.tables["experts"]
    copies, layers = expert_queues.copies(trace), expert_queues.layers(trace)
    top_k, moe_layers = 2, 2
    sent = int(numbers(passes, "tokens").sum()) * top_k * moe_layers
    assert sum(copy["tokens"] for copy in copies) == sum(layer["tokens"] for layer in layers) == sent
    waited = sum(copy["wait"]["mean"] * copy["tokens"] for copy in copies)
    assert waited == approx(numbers(table, "wait").sum(), rel=1e-9, abs=1e-18)


def test_the_loads_of_a_layers_copies_have_mean_one(trace: Trace) -> None:
    loads = defaultdict(list)
    for copy in expert_queues.copies(trace):
        loads[copy["layer"]].append(copy["load"])
    assert loads
    for each in loads.values():
        assert np.mean(each) == approx(1.0)


def test_moments_of_waiting_add_up_to_what_the_table_of_waits_says(trace: Trace) -> None:
    summed: dict[tuple[str, int, int], float] = defaultdict(float)
    for moment in blame.moments(trace):
        summed[moment["operator"], moment["layer"], moment["rank"]] += moment["seconds"]
        assert moment["longest"] <= moment["end"] - moment["start"] + 1e-15
    waits = trace.tables["waits"]
    columns = (
        words(waits, "operator"),
        numbers(waits, "layer"),
        numbers(waits, "rank"),
        numbers(waits, "seconds"),
    )
    known = {(name, layer, rank): seconds for name, layer, rank, seconds in zip(*columns, strict=True)}
    assert set(summed) == set(known)
    for place, seconds in known.items():
        assert summed[place] == approx(seconds, rel=1e-9)


def test_stragglers_share_out_all_waiting(trace: Trace) -> None:
    total = numbers(trace.tables["waits"], "seconds").sum()
    ranks = blame.stragglers(trace)
    assert sum(entry["seconds"] for entry in ranks) == approx(total)
    assert sum(entry["share"] for entry in ranks) == approx(1.0 if total else 0.0)
    assert [entry["seconds"] for entry in ranks] == sorted((e["seconds"] for e in ranks), reverse=True)
    places = blame.waits_by_operator(trace)
    for place in places:
        mine = blame.stragglers(trace, place["operator"])
        assert sum(entry["seconds"] for entry in mine) == approx(place["seconds"])
        assert mine[0]["rank"] == place["rank"]


def test_the_slow_gpu_is_the_straggler_and_the_reason_is_said() -> None:
    worst = blame.stragglers(trace_of(KINDS["a slow GPU"]))[0]
    assert worst["rank"] == 2 and worst["share"] > 0.9
    assert worst["slowness"] == approx(3.0) and "slow GPU" in worst["reasons"]


def test_who_would_be_waited_for_next_is_said_where_two_are_equally_slow() -> None:
    equals = [{"kind": "slow_gpu", "gpu": gpu, "factor": 3.0} for gpu in (0, 2)]
    scene = scenario_of(single_server(4), deployment=parallel(dp=4), faults=equals)
    trace = trace_of(scene)
    first, after = blame.stragglers(trace)[0], blame.next_straggler(trace)
    assert after is not None and {first["rank"], after["rank"]} == {0, 2}
    assert after["wait"] == approx(first["each"], rel=0.1)


def test_pieces_of_a_compute_stream_never_overlap_and_fill_its_shares(trace: Trace) -> None:
    end = trace.facts["simulated_seconds"]
    window = (0.1 * end, 0.7 * end)
    use = over_time.gpu_use(trace, 1, window).shares[:, 0]
    for rank in range(len(use)):
        pieces = [p for p in slice_of(trace, [rank], window) if p["stream"] == "compute"]
        for before, after in pairwise(pieces):
            assert before["end"] <= after["start"]
        seconds = dict.fromkeys(STATES, 0.0)
        for piece in pieces:
            seconds[piece["state"]] += min(piece["end"], window[1]) - max(piece["start"], window[0])
        width = window[1] - window[0]
        assert [seconds[s] / width for s in STATES[:3]] == approx(use[rank, :3].tolist(), abs=1e-9)


def test_a_wait_names_a_rank_that_came_to_the_same_exchange_as_it_ended(trace: Trace) -> None:
    end = trace.facts["simulated_seconds"]
    ranks = numbers(trace.tables["ranks"], "rank").tolist()
    waits = [p for p in slice_of(trace, ranks, (0.0, end)) if p["state"] == "wait"]
    spans = trace.tables["spans"]
    exchanges = set(numbers(spans, "span")[words(spans, "kind") == "exchange"].tolist())
    for wait in (wait for wait in waits if wait["span"] in exchanges):
        same = (words(spans, "operator") == wait["operator"]) & (
            numbers(spans, "rank") == wait["rank_awaited"]
        )
        same &= numbers(spans, "token_batch") == wait["token_batch"]
        same &= numbers(spans, "layer") == wait["layer"]
        assert numbers(spans, "start")[same].tolist() == approx([wait["end"]])


# ---- numbers by hand ------------------------------------------------------------------------------


def test_shares_and_queues_by_hand() -> None:
    # Rank 1 computes from 0 to 1 s, waits to 2 s, exchanges to 3 s. The sums know of six spans more: all
    # was recorded from the end of the first span, 1 s, to the start of the last, 2 s, at least.
    trace = by_hand(simulated_seconds=10.0)
    assert over_time.recorded(trace) == (1.0, 2.0)
    use = over_time.gpu_use(trace, 3, (0.5, 2.0))
    assert np.isnan(use.shares[:, 0]).all()
    assert use.shares[0, 1:].tolist() == approx(np.array([[1, 0, 0, 0], [1, 0, 0, 0]]))
    assert use.shares[1, 1:].tolist() == approx(np.array([[0, 0, 1, 0], [0, 0, 1, 0]]))
    told = over_time.gpu_use(by_hand(recorded=[0.0, 3.0]), 2, (0.0, 6.0)).shares
    assert told[1, 0].tolist() == approx([1 / 3, 1 / 3, 1 / 3, 0.0]) and np.isnan(told[:, 1]).all()
    # 1.5 token-seconds on rank 0 from 1 s to 2 s; 4 on rank 1 from 4 s to 6 s, 0.1 from 1 s to 1.1 s.
    queues = over_time.queue_lengths(trace, 5)
    assert queues.tokens[0].tolist() == approx([0.75, 0.0, 0.0, 0.0, 0.0])
    assert queues.tokens[1].tolist() == approx([0.05, 0.0, 2.0, 0.0, 0.0])


def test_a_link_that_was_down_could_carry_less() -> None:
    # 10 B/s over bins of 5 s; link 0 down from 4 s to 6 s.
    trace = by_hand()
    outage = {"link": 0, "start": 4.0, "end": 6.0, "bandwidth": 0.0, "noticed": np.nan}
    columns = {
        name: np.array([outage.get(name, 0)], dtype=kind) for name, (kind, _) in TABLES["outages"].items()
    }
    use = over_time.link_use(Trace({**trace.tables, "outages": columns}, trace.facts), 2)
    assert use.capacity.tolist() == [[40.0, 40.0], [50.0, 50.0]]
    # 30 B from 2 s to 4 s, 20 B from 4 s to 6 s.
    assert use.bytes.tolist() == [[40.0, 10.0], [0.0, 0.0]]
    assert use.of_tier("gpu-nvswitch").tolist() == [1.0, 0.25]


# ---- levels and versions --------------------------------------------------------------------------


def test_what_only_spans_know_says_what_to_set() -> None:
    trace = trace_of(small("sums"))
    for view in (
        lambda: over_time.gpu_use(trace, 4),
        lambda: slice_of(trace, [0], (0.0, 1.0)),
        lambda: blame.moments(trace),
    ):
        with pytest.raises(ResultError, match=r"--set trace\.level=spans"):
            view()
    assert blame.stragglers(trace) and expert_queues.copies(trace) and gpus(trace)


def test_a_trace_read_column_by_column_is_the_trace_read_whole(tmp_path: Path) -> None:
    files.write(trace_of(small("flows")), tmp_path / "trace")
    stored = sorted(path / "trace" for path in STORED.iterdir() if (path / "trace").is_dir())
    assert stored
    for folder in (tmp_path / "trace", *stored):
        whole, lazy = files.read(folder), files.read(folder)
        assert lazy.facts == whole.facts and list(lazy.tables) == list(whole.tables)
        for table, columns in whole.tables.items():
            assert list(lazy.tables[table]) == list(columns)
            for name, column in columns.items():
                found = lazy.tables[table][name]
                if isinstance(column, Text):
                    assert isinstance(found, Text) and found.rows().tolist() == column.rows().tolist()
                else:
                    np.testing.assert_array_equal(found, column)


@pytest.mark.parametrize("folder", sorted(path for path in STORED.iterdir()), ids=lambda path: path.name)
def test_views_of_stored_results_of_older_versions_work(folder: Path) -> None:
    opened_result = open_result(str(folder))
    result = views_of(opened_result)
    for table, columns in TABLES.items():
        names = ", ".join(f'"{name}"' for name in columns)
        answer = views.sql_view(opened_result, f"select {names} from {table}")
        assert len(answer["rows"]) == len(opened_result.trace.tables[table][next(iter(columns))])
    for entry in result["gpus"]["gpus"]:
        assert sum(entry[state] for state in STATES) == approx(1.0, abs=1e-9)


def views_of(result: Any) -> dict[str, Any]:
    """All views of a result but those of times, without where it lies."""
    found = {
        "gpus": views.gpus_view(result),
        "links": views.links_view(result),
        "experts": views.experts_view(result),
        "stragglers": views.stragglers_view(result),
        "slice": views.slice_view(result, ["0", "3"], Times()),
    }
    for view in found.values():
        view.pop("folder")
    return found


# ---- as it was ------------------------------------------------------------------------------------


def test_the_views_of_a_small_run_are_as_they_were(tmp_path: Path) -> None:
    # Frozen: it shows that something moved, not that it was right; the laws above are about that.
    # Written by `PYTHONPATH=tests python tests/test_trace_views.py`.
    found = json.loads(json.dumps(views_of(opened(tmp_path))))
    assert_alike(found, json.loads(GOLDEN.read_text("utf-8")))


def assert_alike(found: Any, kept: Any, place: str = "") -> None:
    if isinstance(kept, dict):
        assert list(found) == list(kept), place
        for key, value in kept.items():
            assert_alike(found[key], value, f"{place}.{key}")
    elif isinstance(kept, list):
        assert len(found) == len(kept), place
        for n, value in enumerate(kept):
            assert_alike(found[n], value, f"{place}[{n}]")
    elif isinstance(kept, float):
        assert found == approx(kept, rel=1e-9, abs=1e-15), place
    else:
        assert found == kept, place


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(views_of(opened(Path(scratch))), indent=1) + "\n", encoding="utf-8")
