"""Collectives: every entry of the tables by symbols, and on wires none faster than its busiest port.

Parts of 1, 2, 4, 8 … bytes are their own names: the size of a flow says which parts it carries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import cast

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import NIC, NVLINK, fat_tree, parallel, rail_tree, single_server, tiny

from clustersim.engine.fabric import Fabric, Meeting
from clustersim.errors import ClustersimError
from clustersim.physics import exchanges
from clustersim.physics.exchanges import RoutedExchange, route
from clustersim.physics.fidelity import build
from clustersim.physics.pricing import Measured
from clustersim.physics.startup import Shape, Startup
from clustersim.plan.collectives import AUTO, COLLECTIVES, check_algorithms, collective
from clustersim.plan.layout import lay_out
from clustersim.plan.rounds import DOWN, UP, Group, Round, backwards, domains_of, one_domain
from clustersim.plan.stepgraph import Exchange
from clustersim.plan.trees import binary_tree, rings, second_tree, two_trees
from clustersim.spec.deployment import Algorithms
from clustersim.spec.scenario import Scenario

#: Groups whose members sit in one to four domains, as many in each as it comes.
GROUPS = st.lists(st.integers(0, 3), min_size=2, max_size=12).map(
    lambda places: Group(domains_of(np.arange(len(places))[None, :], np.array(places))[0])
)


def may(kind: str, name: str, group: Group) -> bool:
    return COLLECTIVES[kind][name].needs == "anything" or group.sizes.min() > 1


def rounds_of(kind: str, name: str, group: Group, size: np.ndarray) -> list[Round]:
    group = group if may(kind, name, group) else one_domain(group.n)
    return COLLECTIVES[kind][name].rounds(group, size)


def each_round(rounds: list[Round]) -> Iterator[Round]:
    """Every round as often as it is repeated."""
    for one_round in rounds:
        for _ in range(one_round.repeat):
            yield one_round


def flows(one_round: Round, group: int = 0) -> list[tuple[int, int, float]]:
    ends = zip(one_round.source.tolist(), one_round.target.tolist(), strict=True)
    return [(s, t, size) for (s, t), size in zip(ends, one_round.size[group].tolist(), strict=True)]


def waves(one_round: Round) -> Iterator[list[int]]:
    """Flows that can be at work with the same piece at once, one wave behind the other."""
    left = list(range(len(one_round.source)))
    behind = np.full((len(left), 1), -1) if one_round.behind is None else one_round.behind
    done: set[int] = {-1}
    while left:
        ready = [flow for flow in left if done.issuperset(behind[flow].tolist())]
        assert ready, "flows wait for each other"
        yield ready
        done.update(ready)
        left = [flow for flow in left if flow not in done]


def slices_of(name: str, group: Group) -> int:
    """Into how many the bytes are cut, each of which goes its own way: rings."""
    return len(rings(group)) if name == "ring" else 1


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


# ---- where members sit --------------------------------------------------------------------------


def test_domains_are_numbered_as_they_appear_in_every_group() -> None:
    domain = np.array([5, 5, 2, 2, 9, 5])
    found = domains_of(np.array([[0, 1, 2], [4, 0, 4], [2, 5, 3]]), domain)
    assert found.tolist() == [[0, 0, 1], [0, 1, 0], [0, 1, 0]]


def test_the_relay_of_a_member_is_on_its_rail_and_smaller_domains_take_turns() -> None:
    group = Group(np.array([0, 0, 0, 1, 1]))
    assert group.rail.tolist() == [0, 1, 2, 0, 1]
    assert group.relay.tolist() == [[0, 3], [1, 4], [2, 3], [0, 3], [1, 4]]


@given(group=GROUPS)
def test_rings_go_round_all_members_and_every_card_has_its_part(group: Group) -> None:
    orders = rings(group)
    assert (np.sort(orders, axis=1) == np.arange(group.n)).all()
    domain = group.domain[orders]
    for ring in domain:
        entered = ring[ring != np.roll(ring, 1)] if group.domains > 1 else ring[:1]
        assert len(entered) == group.domains, "every domain is entered once"
    if group.domains > 1:
        assert len(orders) == group.sizes.min()
        leaves = orders[domain != np.roll(domain, -1, axis=1)]
        assert np.bincount(leaves).max() == 1 or len(orders) == 1, "nobody sends twice over the network"


def test_rings_keep_to_a_rail_where_they_cross() -> None:
    group = Group(np.repeat(np.arange(4), 4))
    orders = rings(group)
    source, target = orders.ravel(), np.roll(orders, -1, axis=1).ravel()
    across = group.domain[source] != group.domain[target]
    assert (group.rail[source] == group.rail[target])[across].all()
    assert np.bincount(source[across], minlength=16).tolist() == [1] * 16


@given(n=st.integers(1, 130))
def test_two_trees_span_all_and_an_inner_vertex_of_one_is_a_leaf_of_the_other(n: int) -> None:
    inner = []
    for parent in (binary_tree(n), second_tree(n)):
        assert (parent == -1).sum() == 1
        at = np.arange(n)
        for _ in range(2 * n.bit_length()):
            at = np.where(parent[at] >= 0, parent[at], at)
        assert (parent[at] == -1).all(), "everybody is near the root"
        children = np.bincount(parent[parent >= 0], minlength=n)
        assert children.max(initial=0) <= 2
        inner.append(set(np.flatnonzero(children).tolist()))
    assert len(inner[0] & inner[1]) <= n % 2


# ---- who holds what -----------------------------------------------------------------------------


@every("all_gather")
@given(group=GROUPS)
def test_all_gather_brings_every_member_just_what_it_lacked(name: str, group: Group) -> None:
    n, slices = group.n, slices_of(name, group)
    holds = [{(member, cut) for cut in range(slices)} for member in range(n)]
    for one_round in each_round(rounds_of("all_gather", name, group, slices * names(n))):
        before = [set(held) for held in holds]
        for flow, (source, target, size) in enumerate(flows(one_round)):
            for part in parts_in(size):
                piece = part, flow * slices // len(one_round.source)
                assert piece in before[source], "nobody sends what he does not have yet"
                assert piece not in holds[target], "nobody gets anything twice"
                holds[target].add(piece)
    assert holds == [{(part, cut) for part in range(n) for cut in range(slices)}] * n


@every("reduce_scatter")
@given(group=GROUPS)
def test_reduce_scatter_counts_every_contribution_once_where_it_belongs(name: str, group: Group) -> None:
    # sums[member][piece]: whose contributions to the piece a member has added up and not handed on.
    n, slices = group.n, slices_of(name, group)
    pieces = list(product(range(n), range(slices)))
    sums = [{piece: Counter([member]) for piece in pieces} for member in range(n)]
    for one_round in each_round(rounds_of("reduce_scatter", name, group, slices * names(n))):
        moves = [
            (s, t, (part, flow * slices // len(one_round.source)))
            for flow, (s, t, size) in enumerate(flows(one_round))
            for part in parts_in(size)
        ]
        sent = {(source, part): sums[source][part] for source, _, part in moves}
        assert len(sent) == len(moves), "nobody hands the same sum to two"
        for source, part in sent:
            sums[source][part] = Counter()
        for source, target, part in moves:
            sums[target][part] = sums[target][part] + sent[source, part]
    for member, cut in pieces:
        assert sums[member][member, cut] == Counter(range(n))


#: Which pieces of the vector the flows of every round carry, and how many pieces there are.
Carried = tuple[int, list[list[list[int]]]]


def ring_carries(group: Group, rounds: list[Round]) -> Carried:
    n, orders = group.n, rings(group)
    return orders.size, [
        [[ring * n + (place - at) % n] for ring in range(len(orders)) for place in range(n)]
        for at, _ in enumerate(each_round(rounds))
    ]


def one_shot_carries(group: Group, rounds: list[Round]) -> Carried:
    return 1, [[[0] for _ in flows(one)] for one in rounds]


def two_shot_carries(group: Group, rounds: list[Round]) -> Carried:
    scatter, gather = rounds
    return group.n, [[[t] for _, t, _ in flows(scatter)], [[s] for s, _, _ in flows(gather)]]


def hierarchical_carries(group: Group, rounds: list[Round]) -> Carried:
    # Piece (rail, part): a rail's shard is cut into a part per domain for the ring.
    rails, domains = min(Counter(group.domain.tolist()).values()), group.domains
    shard = [[rail * domains + part for part in range(domains)] for rail in range(rails)]
    carried, at = [], 0
    for one in each_round(rounds):
        if one.sending == "apart":
            around = [
                [int(group.rail[s]) * domains + int(group.domain[s] - at) % domains] for s, _, _ in flows(one)
            ]
            carried.append(around)
            at += 1
        else:
            gathers = one is rounds[-1]
            carried.append([shard[group.rail[s if gathers else t]] for s, t, _ in flows(one)])
    return rails * domains, carried


def tree_carries(group: Group, rounds: list[Round]) -> Carried:
    # Flows that are behind each other carry the same piece.
    (one,) = rounds
    piece = list(range(len(one.source)))
    assert one.behind is not None
    for _ in piece:
        for flow, others in enumerate(one.behind.tolist()):
            for other in others:
                if other >= 0:
                    piece[flow] = piece[other] = min(piece[flow], piece[other])
    found = sorted(set(piece))
    return len(found), [[[found.index(p)] for p in piece]]


CARRIES: dict[str, Callable[[Group, list[Round]], Carried]] = {
    "ring": ring_carries,
    "one_shot": one_shot_carries,
    "two_shot": two_shot_carries,
    "hierarchical": hierarchical_carries,
    "double_binary_tree": tree_carries,
}


@pytest.mark.parametrize("name", [name for name in COLLECTIVES["all_reduce"] if name != "in_switch"])
@settings(deadline=None)
@given(group=GROUPS)
def test_all_reduce_counts_every_contribution_once_everywhere(name: str, group: Group) -> None:
    # A part that is not complete is added up and handed on; a complete one is copied.
    n, (pieces, _) = group.n, CARRIES[name](group, rounds_of("all_reduce", name, group, np.ones(1)))
    rounds = rounds_of("all_reduce", name, group, np.array([pieces * 8.0]))
    _, carried = CARRIES[name](group, rounds)
    sums = [[Counter([member]) for _ in range(pieces)] for member in range(n)]
    whole = Counter(range(n))
    for one_round, parts in zip(each_round(rounds), carried, strict=True):
        for wave in waves(one_round):
            before = [list(held) for held in sums]
            for flow in wave:
                source, target, size = flows(one_round)[flow]
                assert size == 8.0 * len(parts[flow])
                for part in parts[flow]:
                    came = before[source][part]
                    sums[target][part] = came if came == whole else sums[target][part] + came
    assert sums == [[whole] * pieces] * n


@given(places=st.lists(st.integers(0, 2), min_size=2, max_size=10))
def test_switches_count_every_contribution_once_everywhere(places: list[int]) -> None:
    # Everybody is there with a twin, so that no switch has a single member.
    group = Group(domains_of(np.arange(2 * len(places))[None, :], np.array(2 * places))[0])
    rails, n = int(group.sizes.min()), group.n
    (one,) = rounds_of("all_reduce", "in_switch", group, np.array([8.0 * rails]))
    assert one.via is not None and one.behind is not None
    switches = [Counter[int]() for _ in range(group.domains)]
    copied: list[dict[int, Counter[int]]] = [{} for _ in range(group.domains)]
    # For each tree of a rail, that is half of its share, and each head: whose contributions it has.
    sums: list[dict[tuple[int, int], Counter[int]]] = [{} for _ in range(n)]
    whole, halves = Counter(range(n)), (0, 1)
    tree_of = dict(zip(np.flatnonzero(one.via == 0), trees_in(group, one), strict=True))
    for wave in waves(one):
        before = [dict(held) for held in sums]
        for flow in wave:
            s, t, size = flows(one)[flow]
            domain, rail = int(group.domain[s]), int(group.rail[s])
            if one.via[flow] == UP and size == 8.0 * rails and not sums[s]:
                switches[domain][s] += 1
            elif one.via[flow] == DOWN and flow < n + rails * group.domains:
                assert size == 8.0
                sums[s] = {(rail, half): Counter(switches[domain]) for half in halves}
            elif one.via[flow] == UP:
                assert size == 8.0
                assert all(sums[s][rail, half] == whole for half in halves)
                copied[domain][rail] = whole
            elif one.via[flow] == DOWN:
                assert size == 8.0 * rails
                assert copied[domain] == dict.fromkeys(range(rails), whole)
                sums[s] = {(r, half): whole for r in range(rails) for half in halves}
            else:
                assert size == 4.0
                piece = tree_of[flow]
                came = before[s][piece]
                sums[t][piece] = came if came == whole else sums[t][piece] + came
    assert sums == [{(r, half): whole for r in range(rails) for half in halves}] * n


def trees_in(group: Group, one: Round) -> list[tuple[int, int]]:
    """(rail, half) of every flow between heads: two trees per rail, each with all edges up and down."""
    edges = 2 * (group.domains - 1)
    return [(r, half) for r in range(int(group.sizes.min())) for half in (0, 1) for _ in range(edges)]


def test_a_switch_halves_what_members_send() -> None:
    (one,) = rounds_of("all_reduce", "in_switch", one_domain(8), np.array([8.0]))
    for via in (UP, DOWN):
        here = one.via == via
        assert np.bincount(one.source[here], one.size[0, here]) == approx([8.0 + 1.0] * 8)


@every("broadcast")
@given(group=GROUPS)
def test_a_broadcast_brings_the_roots_bytes_to_everybody_once(name: str, group: Group) -> None:
    n, slices = group.n, slices_of(name, group)
    (one_round,) = each_round(rounds_of("broadcast", name, group, np.array([5.0 * slices])))
    holds = [[member == 0] * slices for member in range(n)]
    for wave in waves(one_round):
        before = [list(held) for held in holds]
        for flow in wave:
            source, target, size = flows(one_round)[flow]
            cut = flow // (n - 1)
            assert size == 5.0
            assert before[source][cut] or (one_round.behind is None and source == 0)
            assert not holds[target][cut]
            holds[target][cut] = True
    assert holds == [[True] * slices] * n


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
@given(group=GROUPS, size=st.floats(1.0, 1e9))
def test_equal_parts_travel_as_unequal_ones_do(kind: str, group: Group, size: float) -> None:
    for name in COLLECTIVES[kind]:
        equal = rounds_of(kind, name, group, np.full((3, group.n), size))
        unequal = rounds_of(kind, name, group, names(group.n))
        assert pattern(equal) == pattern(unequal)
        for one, other in zip(each_round(equal), each_round(unequal), strict=True):
            slices = slices_of(name, group)
            parts = [len(parts_in(named * slices)) / slices for _, _, named in flows(other)]
            assert one.size == approx(np.broadcast_to(size * np.array(parts), one.size.shape))


@every("all_to_all")
@given(group=GROUPS, data=st.data())
def test_all_to_all_brings_what_was_owed(name: str, group: Group, data: st.DataObject) -> None:
    n = group.n
    drawn = data.draw(st.lists(st.integers(0, 1000), min_size=2 * n * n, max_size=2 * n * n))
    owed = np.array(drawn, dtype=float).reshape(2, n, n)
    rounds = rounds_of("all_to_all", name, group, owed)
    for number in range(2):
        net = np.zeros(n)
        for one_round in each_round(rounds):
            for source, target, size in flows(one_round, number):
                assert source != target
                net[target] += size
                net[source] -= size
        # What comes in, less what goes out, is what was owed less what was one's own to give.
        assert net == approx(owed[number].sum(axis=0) - owed[number].sum(axis=1))


@pytest.mark.parametrize(
    "name", [name for name, entry in COLLECTIVES["all_to_all"].items() if entry.last_hop is None]
)
@given(group=GROUPS)
def test_an_all_to_all_that_passes_nothing_on_sends_each_pair_its_own(name: str, group: Group) -> None:
    n = group.n
    owed = np.arange(1.0, n * n + 1).reshape(1, n, n)
    sent = np.zeros((n, n))
    for one_round in each_round(rounds_of("all_to_all", name, group, owed)):
        for source, target, size in flows(one_round):
            sent[source, target] += size
    np.fill_diagonal(owed[0], 0.0)
    assert np.array_equal(sent, owed[0])


@st.composite
def tokens_of(draw: st.DrawFn) -> tuple[Group, list[tuple[int, frozenset[int]]]]:
    """A group, and tokens: where each stands, and whom it goes to."""
    group = draw(GROUPS)
    member = st.integers(0, group.n - 1)
    token = st.tuples(member, st.frozensets(member, min_size=1, max_size=4))
    return group, draw(st.lists(token, max_size=40))


@pytest.mark.parametrize(
    "name", [name for name, entry in COLLECTIVES["all_to_all"].items() if entry.deduplicated is not None]
)
@given(drawn=tokens_of())
def test_a_token_for_several_of_a_domain_crosses_the_network_once_and_reaches_all_of_them(
    name: str, drawn: tuple[Group, list[tuple[int, frozenset[int]]]]
) -> None:
    group, tokens = drawn
    entry, n = COLLECTIVES["all_to_all"][name], group.n
    assert entry.deduplicated is not None and entry.last_hop is not None
    owed, distinct = np.zeros((1, n, n)), np.zeros((1, n, group.domains))
    for source, targets in tokens:
        for target in targets:
            owed[0, source, target] += 1
        for domain in {int(group.domain[target]) for target in targets}:
            distinct[0, source, domain] += 1
    rounds = entry.deduplicated(group, owed, distinct)
    far = [{(s, d): b for s, d, b in flows(one) if group.domain[s] != group.domain[d]} for one in rounds]
    assert all(not crossing for crossing in far[1:]), "only the first round crosses the network"
    # Follow every token: first to its relay in each domain, once, then to whom it goes.
    first: Counter[tuple[int, int]] = Counter()
    second: Counter[tuple[int, int]] = Counter()
    hop = entry.last_hop(group)
    for source, targets in tokens:
        relays = set()
        for target in targets:
            if group.domain[source] == group.domain[target]:
                assert hop[source, target] == source
                first[source, target] += source != target
                continue
            relay = int(
                group.at[group.domain[target], group.rail[source] % group.sizes[group.domain[target]]]
            )
            relays.add(relay)
            second[relay, target] += relay != target
            assert hop[source, target] == (source if relay == target else relay)
        for relay in relays:
            first[source, relay] += 1
    for one_round, expected in zip(rounds, (first, second), strict=False):
        assert {(s, t): size for s, t, size in flows(one_round) if size} == +expected
    assert sum(second.values()) == 0 or len(rounds) == 2
    # The way back is the way there.
    back = backwards(rounds)
    assert [pattern([one])[0] for one in back] == [
        [(t, s) for s, t in pattern([one])[0]] for one in reversed(rounds)
    ]


@every("point_to_point")
def test_point_to_point_sends_all_to_the_other(name: str) -> None:
    rounds = COLLECTIVES["point_to_point"][name].rounds(one_domain(2), np.array([5.0, 7.0]))
    (one_round,) = each_round(rounds)
    assert [flows(one_round, group) for group in range(2)] == [[(0, 1, 5.0)], [(0, 1, 7.0)]]


@pytest.mark.parametrize("kind, name", [(k, n) for k in COLLECTIVES for n in COLLECTIVES[k]])
@given(group=GROUPS)
def test_members_are_named_by_their_place_and_nobody_sends_to_himself(
    kind: str, name: str, group: Group
) -> None:
    group = one_domain(2) if kind == "point_to_point" else group
    group = group if may(kind, name, group) else one_domain(group.n)
    for one_round in rounds_of(kind, name, group, sizes(kind, 3, group.n)):
        flow = len(one_round.source)
        assert one_round.size.shape == (3, flow) == (3, len(one_round.target))
        for ends in (one_round.source, one_round.target):
            assert ends.min() >= 0 and ends.max() < group.n
        via = np.zeros(flow) if one_round.via is None else one_round.via
        assert ((one_round.source == one_round.target) == (via > 0)).all(), "unless it is to a switch"
        if one_round.behind is not None:
            assert one_round.behind.shape[0] == flow
            # A flow is behind what its source gets, or what its switch gets from others.
            for one, others in enumerate(one_round.behind.tolist()):
                for other in (o for o in others if o >= 0):
                    if via[one] == DOWN:
                        assert via[other] == UP
                        assert group.domain[one_round.source[other]] == group.domain[one_round.source[one]]
                    else:
                        assert via[other] != UP and one_round.target[other] == one_round.source[one]


def test_the_ring_and_two_shots_send_the_least_there_is() -> None:
    # Vector of 24 bytes, 4 members: 3 of 4 parts of 6 bytes, there and back.
    for name in ("ring", "two_shot"):
        sent: Counter[int] = Counter()
        for one_round in each_round(rounds_of("all_reduce", name, one_domain(4), np.array([24.0]))):
            for source, _, size in flows(one_round):
                sent[source] += size  # type: ignore[assignment]
        assert set(sent.values()) == {2 * 3 * 6}


@given(domains=st.integers(2, 8), each=st.integers(1, 8))
def test_trees_load_the_ports_of_all_alike(domains: int, each: int) -> None:
    # No member sends or gets more than twice the vector, and no rail more than twice its share of it.
    group = Group(np.repeat(np.arange(domains), each))
    assert len(two_trees(group)) == 2 * each
    (one,) = rounds_of("all_reduce", "double_binary_tree", group, np.array([8.0 * each]))
    across = group.domain[one.source] != group.domain[one.target]
    for ends, here, most in product((one.source, one.target), (across, ~across), (16.0, 16.0 * each)):
        if here is across or most > 16.0:
            carried = np.bincount(ends[here], one.size[0, here], group.n)
            assert carried.max() <= most + 1e-9


def test_an_unknown_algorithm_is_refused_with_those_there_are() -> None:
    with pytest.raises(ClustersimError, match=r'"rign".*did you mean "ring".*there are ring, double_binary'):
        collective("all_reduce", "rign")
    with pytest.raises(ClustersimError, match=r"broadcast.*binary_tree, direct, auto"):
        check_algorithms(Algorithms(broadcast="tree"))


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_every_kind_can_be_named_in_a_scenario_and_left_to_choose(kind: str) -> None:
    for name in (*COLLECTIVES[kind], AUTO):
        check_algorithms(Algorithms(**{kind: name}))


# ---- on wires -----------------------------------------------------------------------------------


def sizes(kind: str, groups: int, n: int, seed: int = 0) -> np.ndarray:
    """Uneven bytes in the shape that the kind wants."""
    shape = {"all_gather": (groups, n), "reduce_scatter": (groups, n), "all_to_all": (groups, n, n)}
    drawn = np.random.default_rng(seed).integers(0, 10_000, shape.get(kind, (groups,)))
    return drawn.astype(float) + 1.0


def happened(
    exchange: Exchange,
    scenario: Scenario,
    arrivals: list[float],
    fidelity: str,
    launch: float = 0.0,
    costs: Measured | None = None,
) -> tuple[Meeting, RoutedExchange]:
    """The exchange by itself; each member arrives at its time."""
    layout = lay_out(scenario)
    routed = route(exchange, layout, launch, costs)
    env = simpy.Environment()
    meeting = Meeting(Fabric(env, build(fidelity, layout.topology.links.bandwidth, 1000.0)), routed)

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
    "unlike groups": (rail_tree(2, 4), np.array([[0, 1], [2, 4], [3, 5], [7, 6]])),
    "uneven domains": (rail_tree(2, 4), np.array([[0, 4, 1, 2], [5, 3, 7, 6]])),
}
KINDS = [(kind, name) for kind in COLLECTIVES for name in COLLECTIVES[kind]]


@pytest.mark.parametrize("fidelity", ["fluid", "chunked"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind, name", KINDS)
def test_no_exchange_is_faster_than_its_busiest_port(kind: str, name: str, place: str, fidelity: str) -> None:
    topology, groups = PLACES[place]
    groups = groups.reshape(-1, 2) if kind == "point_to_point" else groups
    scenario = tiny(
        topology, deployment=parallel(dp=8, etp=2, algorithms={kind: name}), workload={"sequences": 8}
    )
    exchange = Exchange(kind, groups, sizes(kind, *groups.shape))
    arrivals = np.random.default_rng(1).uniform(0, 2e-5, 8).tolist()
    if COLLECTIVES[kind][name].needs == "switches" and place not in ("one server", "two servers"):
        with pytest.raises(ClustersimError, match="some reach no other through an NVSwitch"):
            happened(exchange, scenario, arrivals, fidelity)
        return
    meeting, routed = happened(exchange, scenario, arrivals, fidelity)
    assert routed.algorithm == name
    links = lay_out(scenario).topology.links
    # The first of them cannot send before it is there.
    assert max(meeting.done) - min(arrivals) >= (routed.carried[0] / links.bandwidth).max() * (1 - 1e-9)
    sent, received = np.zeros(8), np.zeros(8)
    for one_round, ends in zip(routed.rounds, meeting.ends, strict=True):
        up, down = one_round.via != DOWN, one_round.via != UP
        np.add.at(sent, one_round.source[up], one_round.flows.size[up])
        np.add.at(received, one_round.target[down], one_round.flows.size[down])
        assert np.isfinite(ends).all(), "every flow arrives"
    for member, rank in enumerate(routed.ranks):
        gpu = f"gpu{rank}"
        out = routed.carried[0][[source == gpu for source in links.source]].sum()
        into = routed.carried[0][[target == gpu for target in links.target]].sum()
        # A GPU may also pass on what is for others (PXN), as much in as out.
        assert out - sent[member] == approx(into - received[member], abs=1e-6)
        assert meeting.done[member] >= (0 if kind == "point_to_point" else arrivals[member])


@pytest.mark.parametrize("kind, name", KINDS)
def test_an_exchange_among_all_begins_with_the_last_and_a_one_sided_one_with_each(
    kind: str, name: str
) -> None:
    groups = np.arange(8).reshape(4, 2) if kind == "point_to_point" else np.arange(8).reshape(2, 4)
    scenario = tiny(
        single_server(8),
        deployment=parallel(dp=8, algorithms={kind: name}),
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
    exchange = Exchange("all_reduce", np.arange(4)[None, :], np.array([4000.0]), algorithm="ring")
    meeting, _ = happened(exchange, scenario, [0.0] * 4, "fluid", launch=5e-6)
    assert meeting.done == approx([5e-6 + 6e-6 + 6000 / NVLINK] * 4)


# ---- closed forms: two servers of eight GPUs ----------------------------------------------------

S = 1.6e9
EIGHT = np.arange(16)[None, :]
#: (kind, name) → seconds for S bytes (of a vector; of all parts together; from each member to all)
TWO_BY_EIGHT = {
    # 30 rounds of a sixteenth; eight rings, so that all cards carry an eighth of it.
    ("all_reduce", "ring"): 30 / 16 * S / 8 / NIC,
    ("all_gather", "ring"): 15 / 16 * S / 8 / NIC,
    ("reduce_scatter", "ring"): 15 / 16 * S / 8 / NIC,
    # One and an eighth through every port; an eighth, in two halves, along every rail.
    ("all_reduce", "in_switch"): max(9 / 8 * S / NVLINK, S / 8 / NIC),
    # Eight shards of which a member gets seven foreign ones to sum; halves of them round a ring of two.
    ("all_reduce", "hierarchical"): 2 * 7 / 8 * S / NVLINK + 2 * S / 16 / NIC,
    # In a server every member passes on seven of eight rails, up and down; a card only an eighth.
    ("all_reduce", "double_binary_tree"): max(2 * 7 / 8 * S / NVLINK, S / 8 / NIC),
    # A part crosses the network once and NVLink in the other server; the own server's parts go beside.
    ("all_gather", "hierarchical"): S / 16 / NIC + 7 * 2 * S / 16 / NVLINK,
    ("reduce_scatter", "hierarchical"): S / 16 / NIC + 7 * 2 * S / 16 / NVLINK,
    # Piece by piece through all, an eighth on every ring: as fast as the slowest hop.
    ("broadcast", "ring"): max(S / NVLINK, S / 8 / NIC),
    # Eight sixteenths over the network on the own rail, of which seven are handed on.
    ("all_to_all", "hierarchical"): S / 2 / NIC + 7 / 16 * S / NVLINK,
}


@pytest.mark.parametrize("kind, name", TWO_BY_EIGHT)
def test_two_servers_of_eight_take_what_the_closed_form_says(kind: str, name: str) -> None:
    scenario = tiny(
        rail_tree(2, 8),
        deployment=parallel(dp=16, etp=4, algorithms={kind: name}),
        workload={"sequences": 16},
    )
    shape = {"all_gather": (1, 16), "reduce_scatter": (1, 16), "all_to_all": (1, 16, 16)}.get(kind, (1,))
    size = np.full(shape, S / (16 if len(shape) > 1 else 1))
    meeting, _ = happened(Exchange(kind, EIGHT, size), scenario, [0.0] * 16, "fluid")
    assert max(meeting.done) == approx(TWO_BY_EIGHT[kind, name], rel=1e-6)


def test_what_is_counted_once_crosses_the_network_once_there_and_back() -> None:
    # Each token goes to two ranks of the other server: half of the bytes cross the network.
    scenario = tiny(
        rail_tree(2, 8),
        deployment=parallel(dp=16, etp=4, algorithms={"all_to_all": "hierarchical"}),
        workload={"sequences": 16},
    )
    owed = np.full((1, 16, 16), S / 16)
    once = np.full((1, 16, 2), S / 4)
    for exchange in (
        Exchange("all_to_all", EIGHT, owed, once),
        Exchange("all_to_all", EIGHT, owed.transpose(0, 2, 1), once, back=True),
    ):
        meeting, routed = happened(exchange, scenario, [0.0] * 16, "fluid")
        assert max(meeting.done) == approx(S / 4 / NIC + 7 / 16 * S / NVLINK, rel=1e-6)
        tiers = lay_out(scenario).topology.links.tier
        assert routed.carried[0][[tier == "gpu-nic" for tier in tiers]] == approx(S / 4)


@pytest.mark.parametrize("name", COLLECTIVES["all_to_all"])
@pytest.mark.parametrize("place", ["two servers", "uneven domains", "unlike groups"])
def test_what_is_owed_has_come_with_the_last_flow_it_goes_by(name: str, place: str) -> None:
    topology, groups = PLACES[place]
    scenario = tiny(
        topology, deployment=parallel(dp=8, etp=2, algorithms={"all_to_all": name}), workload={"sequences": 8}
    )
    n = groups.shape[1]
    owed = sizes("all_to_all", len(groups), n)
    owed[:, 0, 1] = 0.0
    layout = lay_out(scenario)
    routed = route(Exchange("all_to_all", groups, owed), layout, 0.0)
    assert routed.brought is not None
    source = np.concatenate([one.source for one in routed.rounds])
    target = np.concatenate([one.target for one in routed.rounds])
    first = len(routed.rounds[0].source)
    for row, (group, domain) in enumerate(
        zip(groups, domains_of(groups, layout.topology.domain), strict=True)
    ):
        how = Group(domain)
        for i, j in product(range(n), range(n)):
            flow = int(routed.brought[row * n + j, i])
            if i == j or (owed[row, i, j] == 0 and flow < 0):
                continue
            relay = int(how.relay[i, domain[j]])
            straight = name != "hierarchical" or domain[i] == domain[j] or relay == j
            assert target[flow] == row * n + j, group
            if owed[row, i, j]:
                assert source[flow] == row * n + (i if straight else relay)
                assert (flow < first) == straight


def test_a_switch_halves_the_bytes_of_a_ring() -> None:
    scenario = tiny(
        single_server(8, latency=1e-6),
        deployment=parallel(dp=8, etp=2, algorithms={"all_reduce": "in_switch"}),
        workload={"sequences": 8},
    )
    exchange = Exchange("all_reduce", np.arange(8)[None, :], np.array([S]))
    meeting, routed = happened(exchange, scenario, [0.0] * 8, "fluid", launch=5e-6)
    # Half a microsecond up, half down, and the same for the sums.
    assert meeting.done == approx([5e-6 + 2e-6 + 9 / 8 * S / NVLINK] * 8)
    assert routed.carried[0] == approx(9 / 8 * S)


def test_a_pipeline_waits_for_the_latency_of_every_hop_once() -> None:
    # Down a chain of eight: seven hops of 1 us; then everybody sends and gets the bytes once.
    scenario = tiny(
        single_server(8, latency=1e-6), deployment=parallel(dp=8, etp=2), workload={"sequences": 8}
    )
    exchange = Exchange("broadcast", np.arange(8)[None, :], np.array([1e6]), algorithm="ring")
    meeting, _ = happened(exchange, scenario, [0.0] * 8, "fluid")
    assert meeting.done == approx([7e-6 + 1e6 / NVLINK] * 8)
    # Two trees over eight: depth 3, up and down.
    exchange = Exchange("all_reduce", np.arange(8)[None, :], np.array([8.0]), algorithm="double_binary_tree")
    meeting, _ = happened(exchange, scenario, [0.0] * 8, "fluid")
    assert meeting.done == approx([6e-6] * 8, rel=1e-3)


@pytest.mark.parametrize("kind, name", KINDS)
@pytest.mark.parametrize("latency", [0.0, 1e-6])
def test_start_up_costs_are_paid_once_and_the_wire_carries_more_than_the_payload(
    kind: str, name: str, latency: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = np.array([[0, 4]]) if kind == "point_to_point" else np.arange(8)[None, :]

    def done(latency: float, launch: float, costs: Measured | None) -> tuple[float, RoutedExchange]:
        scenario = tiny(
            rail_tree(2, 4, latency=latency), deployment=parallel(dp=8, etp=2), workload={"sequences": 8}
        )
        even = np.full(sizes(kind, 1, groups.shape[1]).shape, 1e6)
        exchange = Exchange(kind, groups, even, algorithm=name)
        meeting, routed = happened(exchange, scenario, [0.0] * groups.size, "fluid", launch, costs)
        return max(meeting.done), routed

    def fitted(costs: Measured, exchange: Exchange, algorithm: str, shape: Shape, size: float) -> Startup:
        assert costs is known and algorithm == name
        assert (shape.members, shape.domains) == (groups.shape[1], 2)
        return Startup(launch=3e-6, step=0.0, wire=1.25, latency=40e-6, transfer=0.0)

    known = cast(Measured, object())
    monkeypatch.setattr(exchanges, "startup_of", fitted)
    bare, without = done(0.0, 0.0, None)
    priced, routed = done(latency, 5e-6, known)
    # Where flows begin at different times, some have a port to themselves for a while.
    late = 40e-6 if any(one.sending == "interleaved" for one in rounds_for(kind, name)) else 0.0
    # The launch that was measured takes the place of the GPU's.
    whole = 3e-6 + 40e-6 + 1.25 * bare
    assert whole - late <= priced <= whole * (1 + 1e-9)
    assert routed.carried[0] == approx(1.25 * without.carried[0])
    # Bounds know nothing of what protocols add.
    assert routed.carried[1] == approx(without.carried[0])
    payload = [sum(one.payload.sum() for one in one.rounds) for one in (routed, without)]
    assert payload[0] == approx(payload[1])


def test_what_no_closed_form_knows_costs_the_launch_of_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(costs: Measured, exchange: Exchange, algorithm: str, shape: Shape, size: float) -> None:
        return None

    scenario = tiny(single_server(4), deployment=parallel(dp=4, algorithms={"all_reduce": "one_shot"}))
    exchange = Exchange("all_reduce", np.arange(4)[None, :], np.array([1e6]))
    monkeypatch.setattr(exchanges, "startup_of", unknown)
    meeting, _ = happened(exchange, scenario, [0.0] * 4, "fluid", launch=5e-6, costs=cast(Measured, object()))
    assert meeting.done == approx([5e-6 + 3e6 / NVLINK] * 4)


def rounds_for(kind: str, name: str) -> list[Round]:
    group = one_domain(2) if kind == "point_to_point" else Group(np.repeat([0, 1], 4))
    return rounds_of(kind, name, group, sizes(kind, 1, group.n))


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("place", PLACES)
def test_auto_takes_what_these_groups_can_do(kind: str, place: str) -> None:
    topology, groups = PLACES[place]
    groups = groups.reshape(-1, 2) if kind == "point_to_point" else groups
    scenario = tiny(
        topology, deployment=parallel(dp=8, etp=2, algorithms={kind: AUTO}), workload={"sequences": 8}
    )
    meeting, routed = happened(
        Exchange(kind, groups, sizes(kind, *groups.shape)), scenario, [0.0] * 8, "fluid"
    )
    assert routed.algorithm in COLLECTIVES[kind]
    assert np.isfinite(meeting.done).all()


def test_switches_do_not_add_up_where_there_are_none() -> None:
    with pytest.raises(ClustersimError, match=r'"in_switch" needs an NVSwitch.* of 2 stands alone'):
        lay_out(tiny(rail_tree(2, 1), deployment=parallel(tp=2, algorithms={"all_reduce": "in_switch"})))


@pytest.mark.parametrize("name", ["one_shot", "two_shot"])
def test_kernels_that_write_over_nvlink_stay_in_one_domain(name: str) -> None:
    deployment = parallel(tp=4, algorithms={"all_reduce": name})
    lay_out(tiny(single_server(4), deployment=deployment))
    with pytest.raises(ClustersimError, match=rf'"{name}" writes into the memory.* group of 4 reaches over'):
        lay_out(tiny(rail_tree(2, 2), deployment=deployment))
