"""Collectives: every entry of the tables by symbols, and on wires none faster than its busiest port.

Parts of 1, 2, 4, 8 … bytes are their own names: the size of a flow says which parts it carries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import NVLINK, fat_tree, parallel, rail_tree, single_server, tiny

from clustersim.engine.fabric import Fabric, Meeting
from clustersim.errors import ClustersimError
from clustersim.physics.exchanges import RoutedExchange, route
from clustersim.physics.fidelity import build
from clustersim.plan.collectives import COLLECTIVES, Round, collective
from clustersim.plan.layout import lay_out
from clustersim.plan.stepgraph import Exchange
from clustersim.spec.deployment import Algorithms
from clustersim.spec.scenario import Scenario

MEMBERS = st.integers(2, 12)


def each_round(rounds: list[Round]) -> Iterator[Round]:
    """Every round as often as it is repeated."""
    for one_round in rounds:
        for _ in range(one_round.repeat):
            yield one_round


def flows(one_round: Round, group: int = 0) -> list[tuple[int, int, float]]:
    ends = zip(one_round.source.tolist(), one_round.target.tolist(), strict=True)
    return [(s, t, size) for (s, t), size in zip(ends, one_round.size[group].tolist(), strict=True)]


def parts_in(size: float) -> list[int]:
    assert size == int(size)
    return [part for part in range(int(size).bit_length()) if int(size) >> part & 1]


def names(n: int) -> np.ndarray:
    return 2.0 ** np.arange(n)[None, :]


def pattern(rounds: list[Round]) -> list[list[tuple[int, int]]]:
    """Who sends to whom in every round."""
    return [[(s, t) for s, t, _ in flows(one_round)] for one_round in each_round(rounds)]


def every(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", COLLECTIVES[kind])


# ---- who holds what -----------------------------------------------------------------------------


@every("all_gather")
@given(n=MEMBERS)
def test_all_gather_brings_every_member_just_what_it_lacked(name: str, n: int) -> None:
    holds = [{member} for member in range(n)]
    for one_round in each_round(COLLECTIVES["all_gather"][name].rounds(n, names(n))):
        before = [set(held) for held in holds]
        for source, target, size in flows(one_round):
            for part in parts_in(size):
                assert part in before[source], "nobody sends what he does not have yet"
                assert part not in holds[target], "nobody gets anything twice"
                holds[target].add(part)
    assert holds == [set(range(n))] * n


@every("reduce_scatter")
@given(n=MEMBERS)
def test_reduce_scatter_counts_every_contribution_once_where_it_belongs(name: str, n: int) -> None:
    # sums[member][part]: whose contributions to the part a member has added up and not handed on.
    sums = [[Counter([member]) for _ in range(n)] for member in range(n)]
    for one_round in each_round(COLLECTIVES["reduce_scatter"][name].rounds(n, names(n))):
        moves = [(s, t, part) for s, t, size in flows(one_round) for part in parts_in(size)]
        sent = {(source, part): sums[source][part] for source, _, part in moves}
        assert len(sent) == len(moves), "nobody hands the same sum to two"
        for source, part in sent:
            sums[source][part] = Counter()
        for source, target, part in moves:
            sums[target][part] = sums[target][part] + sent[source, part]
    for member in range(n):
        assert sums[member][member] == Counter(range(n))


def ring_part(at: int, source: int, target: int, n: int) -> int:
    return (source - at) % n


def direct_part(at: int, source: int, target: int, n: int) -> int:
    return target if at == 0 else source


#: Which part a flow of each all-reduce carries: (round, source, target, members) → part.
CARRIES: dict[str, Callable[[int, int, int, int], int]] = {"ring": ring_part, "direct": direct_part}


@every("all_reduce")
@given(n=MEMBERS)
def test_all_reduce_counts_every_contribution_once_everywhere(name: str, n: int) -> None:
    # A part that is not complete is added up and handed on; a complete one is copied.
    sums = [[Counter([member]) for _ in range(n)] for member in range(n)]
    whole = Counter(range(n))
    for at, one_round in enumerate(
        each_round(COLLECTIVES["all_reduce"][name].rounds(n, np.array([n * 8.0])))
    ):
        before = [list(held) for held in sums]
        for source, target, size in flows(one_round):
            part = CARRIES[name](at, source, target, n)
            assert size == 8.0
            came = before[source][part]
            sums[target][part] = came if came == whole else sums[target][part] + came
    assert sums == [[whole] * n] * n


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
@given(n=MEMBERS, size=st.floats(1.0, 1e9))
def test_equal_parts_travel_as_unequal_ones_do(kind: str, n: int, size: float) -> None:
    for entry in COLLECTIVES[kind].values():
        equal = entry.rounds(n, np.full((3, n), size))
        assert pattern(equal) == pattern(entry.rounds(n, names(n)))
        assert all((one_round.size == size).all() for one_round in equal)


@every("all_to_all")
@given(n=MEMBERS, data=st.data())
def test_all_to_all_brings_what_was_owed(name: str, n: int, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.integers(0, 1000), min_size=2 * n * n, max_size=2 * n * n))
    owed = np.array(drawn, dtype=float).reshape(2, n, n)
    rounds = COLLECTIVES["all_to_all"][name].rounds(n, owed)
    for group in range(2):
        net = np.zeros(n)
        for one_round in each_round(rounds):
            for source, target, size in flows(one_round, group):
                assert source != target
                net[target] += size
                net[source] -= size
        # What comes in, less what goes out, is what was owed less what was one's own to give.
        assert net == approx(owed[group].sum(axis=0) - owed[group].sum(axis=1))


@every("all_to_all")
@given(n=MEMBERS)
def test_an_all_to_all_that_passes_nothing_on_sends_each_pair_its_own(name: str, n: int) -> None:
    owed = np.arange(1.0, n * n + 1).reshape(1, n, n)
    sent = np.zeros((n, n))
    for one_round in each_round(COLLECTIVES["all_to_all"][name].rounds(n, owed)):
        for source, target, size in flows(one_round):
            sent[source, target] += size
    np.fill_diagonal(owed[0], 0.0)
    assert np.array_equal(sent, owed[0])


@every("point_to_point")
def test_point_to_point_sends_all_to_the_other(name: str) -> None:
    (one_round,) = each_round(COLLECTIVES["point_to_point"][name].rounds(2, np.array([5.0, 7.0])))
    assert [flows(one_round, group) for group in range(2)] == [[(0, 1, 5.0)], [(0, 1, 7.0)]]


@pytest.mark.parametrize("kind, name", [(k, n) for k in COLLECTIVES for n in COLLECTIVES[k]])
@given(n=MEMBERS)
def test_members_are_named_by_their_place_and_nobody_sends_to_himself(kind: str, name: str, n: int) -> None:
    n = 2 if kind == "point_to_point" else n
    for one_round in COLLECTIVES[kind][name].rounds(n, sizes(kind, 3, n)):
        assert one_round.size.shape == (3, len(one_round.source)) == (3, len(one_round.target))
        for ends in (one_round.source, one_round.target):
            assert ends.min() >= 0 and ends.max() < n
        assert (one_round.source != one_round.target).all()


def test_the_ring_and_the_direct_way_send_the_least_there_is() -> None:
    # Vector of 24 bytes, 4 members: 3 of 4 parts of 6 bytes, there and back.
    for name in COLLECTIVES["all_reduce"]:
        sent: Counter[int] = Counter()
        for one_round in each_round(COLLECTIVES["all_reduce"][name].rounds(4, np.array([24.0]))):
            for source, _, size in flows(one_round):
                sent[source] += size  # type: ignore[assignment]
        assert set(sent.values()) == {2 * 3 * 6}


def test_an_unknown_algorithm_is_refused_with_those_there_are() -> None:
    with pytest.raises(ClustersimError, match=r'"rign".*did you mean "ring".*there are ring, direct'):
        collective("all_reduce", Algorithms(all_reduce="rign"))


# ---- on wires -----------------------------------------------------------------------------------


def sizes(kind: str, groups: int, n: int, seed: int = 0) -> np.ndarray:
    """Uneven bytes in the shape that the kind wants."""
    shape = {"all_reduce": (groups,), "point_to_point": (groups,), "all_to_all": (groups, n, n)}
    drawn = np.random.default_rng(seed).integers(0, 10_000, shape.get(kind, (groups, n)))
    return drawn.astype(float) + 1.0


def happened(
    exchange: Exchange, scenario: Scenario, arrivals: list[float], fidelity: str, launch: float = 0.0
) -> tuple[Meeting, RoutedExchange]:
    """The exchange by itself; each member arrives at its time."""
    layout = lay_out(scenario)
    links = layout.topology.links
    algorithms = layout.deployment.algorithms
    routed = route(exchange, algorithms, layout.paths, len(links.bandwidth), launch)
    env = simpy.Environment()
    meeting = Meeting(Fabric(env, build(fidelity, links.bandwidth, 1000.0)), routed)

    def member(number: int) -> Iterator[simpy.Event]:
        yield env.timeout(arrivals[number])
        yield meeting.arrive(number)

    for number in range(len(arrivals)):
        if exchange.kind != "point_to_point" or number % 2 == 0:
            env.process(member(number))
        else:
            meeting.expect(number)
    env.run()
    return meeting, routed


#: machine of eight GPUs, groups of its ranks
PLACES = {
    "one server": (single_server(8), np.arange(8).reshape(2, 4)),
    "two servers": (rail_tree(2, 4, latency=1e-6), np.arange(8).reshape(1, 8)),
    "groups across": (rail_tree(2, 4, nics=2), np.arange(8).reshape(2, 4).T),
    "leaves": (fat_tree(4, 2, nics=1), np.arange(8).reshape(4, 2).T),
}
KINDS = [(kind, name) for kind in COLLECTIVES for name in COLLECTIVES[kind]]


@pytest.mark.parametrize("fidelity", ["fluid", "chunked"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind, name", KINDS)
def test_no_exchange_is_faster_than_its_busiest_port(kind: str, name: str, place: str, fidelity: str) -> None:
    topology, groups = PLACES[place]
    groups = groups.reshape(-1, 2) if kind == "point_to_point" else groups
    algorithms = {} if kind == "point_to_point" else {kind: name}
    scenario = tiny(
        topology, deployment=parallel(dp=8, etp=2, algorithms=algorithms), workload={"sequences": 8}
    )
    exchange = Exchange(kind, groups, sizes(kind, *groups.shape))
    arrivals = np.random.default_rng(1).uniform(0, 2e-5, 8).tolist()
    meeting, routed = happened(exchange, scenario, arrivals, fidelity)
    links = lay_out(scenario).topology.links
    # The first of them cannot send before it is there.
    assert max(meeting.done) - min(arrivals) >= (routed.carried / links.bandwidth).max() * (1 - 1e-9)
    sent, received = np.zeros(8), np.zeros(8)
    for one_round, ends in zip(routed.rounds, meeting.ends, strict=True):
        np.add.at(sent, one_round.source, one_round.flows.size)
        np.add.at(received, one_round.target, one_round.flows.size)
        assert np.isfinite(ends).all(), "every flow arrives"
    for member, rank in enumerate(routed.ranks):
        gpu = f"gpu{rank}"
        out = routed.carried[[source == gpu for source in links.source]].sum()
        into = routed.carried[[target == gpu for target in links.target]].sum()
        # A GPU may also pass on what is for others (PXN), as much in as out.
        assert out - sent[member] == approx(into - received[member], abs=1e-6)
        assert meeting.done[member] >= (0 if kind == "point_to_point" else arrivals[member])


@pytest.mark.parametrize("kind, name", KINDS)
def test_an_exchange_among_all_begins_with_the_last_and_a_one_sided_one_with_each(
    kind: str, name: str
) -> None:
    groups = np.arange(8).reshape(4, 2) if kind == "point_to_point" else np.arange(8).reshape(2, 4)
    algorithms = {} if kind == "point_to_point" else {kind: name}
    scenario = tiny(
        single_server(8),
        deployment=parallel(dp=8, algorithms=algorithms),
        workload={"sequences": 8},
        model={"experts": 8},
    )
    arrivals = [float(member) for member in range(8)]
    exchange = Exchange(kind, groups, sizes(kind, *groups.shape))
    meeting, routed = happened(exchange, scenario, arrivals, "fluid")
    n = groups.shape[1]
    for one_round, starts in zip(routed.rounds[:1], meeting.starts, strict=False):
        group_is_there = (one_round.source // n + 1) * n - 1.0
        expected = group_is_there if routed.meets == "all" else one_round.source.astype(float)
        assert starts == approx(expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), late=st.lists(st.floats(0, 1e-5), min_size=4, max_size=4))
def test_whoever_gets_something_is_done_after_whoever_sends_it_came(seed: int, late: list[float]) -> None:
    for name in COLLECTIVES["all_to_all"]:
        scenario = tiny(
            single_server(4),
            deployment=parallel(dp=4, algorithms={"all_to_all": name}),
        )
        owed = np.random.default_rng(seed).integers(0, 3, (1, 4, 4)) * 1000.0
        exchange = Exchange("all_to_all", np.arange(4)[None, :], owed)
        meeting, _ = happened(exchange, scenario, late, "fluid")
        for target in range(4):
            for source in range(4):
                if owed[0, source, target] or source == target:
                    assert meeting.done[target] >= late[source]
            # Its own port, in and out, is busy at least that long; a flow is done with half a byte left.
            port = max(owed[0, target].sum(), owed[0, :, target].sum()) - owed[0, target, target]
            assert meeting.done[target] >= min(late) + (port - 3 * 0.5) / NVLINK * (1 - 1e-9)


@pytest.mark.parametrize("name", COLLECTIVES["all_gather"])
def test_a_group_does_not_wait_for_the_latency_of_another(name: str) -> None:
    # Ranks 0 and 1 sit in one server, and 4 and 5. Between 2 and 3 the way leads over NVLink to the right
    # rail (1 ms) and through the cards (2 ms).
    scenario = tiny(
        rail_tree(2, 3, latency=1e-3),
        deployment=parallel(tp=2, dp=3, algorithms={"all_gather": name}),
        model={"experts": 6},
        workload={"sequences": 3},
    )
    exchange = Exchange("all_gather", np.arange(6).reshape(3, 2), np.full((3, 2), 8.0))
    meeting, _ = happened(exchange, scenario, [0.0] * 6, "fluid")
    assert meeting.done == approx([1e-3, 1e-3, 3e-3, 3e-3, 1e-3, 1e-3], rel=1e-3)


def test_an_exchange_without_bytes_takes_no_time() -> None:
    scenario = tiny(single_server(4), deployment=parallel(dp=4))
    exchange = Exchange("all_to_all", np.arange(4)[None, :], np.zeros((1, 4, 4)))
    meeting, routed = happened(exchange, scenario, [0.0, 3.0, 1.0, 2.0], "fluid", launch=1e-6)
    assert routed.rounds == ()
    assert meeting.done == [3.0] * 4


def test_rounds_wait_for_their_latency_once_each_and_for_one_launch() -> None:
    # A ring of four in one server: 2 * 3 rounds of 1 us, a launch of 5 us, and 6 parts of 1000 B.
    scenario = tiny(single_server(4, latency=1e-6), deployment=parallel(tp=4))
    exchange = Exchange("all_reduce", np.arange(4)[None, :], np.array([4000.0]))
    meeting, _ = happened(exchange, scenario, [0.0] * 4, "fluid", launch=5e-6)
    assert meeting.done == approx([5e-6 + 6e-6 + 6000 / NVLINK] * 4)
