"""The chunked network: what queues do, how it meets the fluid as chunks shrink, and how it is asked for."""

from heapq import heappop, heappush
from itertools import count, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scenarios import table, tiny, trace_of
from test_network import finish_times, flows, random_flows, random_traffic

from clustersim.engine import simulation
from clustersim.errors import ClustersimError, ScenarioError
from clustersim.physics import chunked
from clustersim.physics.chunked import Chunked, Deadlock, Queues, services
from clustersim.physics.depths import Depth
from clustersim.physics.fidelity import build, depths
from clustersim.physics.fluid import Fluid
from clustersim.physics.network import PortBound
from clustersim.physics.plain_fluid import PlainFluid
from clustersim.study.run import run_scenario

CHUNK = 50_000.0
SWITCHING = ("store_and_forward", "cut_through")
BLAST = 1_000_000

#: Every way to queue; the buffers are wide enough for the traffic here never to stand in a circle.
WAYS = {
    f"{queueing} {switching}{' bounded' if buffer else ''}": Queues(queueing, switching, 2, buffer)
    for queueing, switching, buffer in [
        *product(("fair", "fifo"), SWITCHING, (0.0,)),
        *product(("fifo",), SWITCHING, (1e8,)),
    ]
}

#: How often links serve a chunk in a case.
COARSE_FINE = (2_500, 20_000)

seeds = st.integers(0, 2**32 - 1)
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_switching = pytest.mark.parametrize("switching", SWITCHING)


def ends(capacity, group, chunk, queues, changes=()):
    """When each flow of one start ends, float64[F] s."""
    network = Chunked(np.array(capacity, dtype=float), chunk, queues)
    return finish_times(network, [(0.0, "all", group)], changes)["all"]


# The chunks judge the fluid: 200 random cases


def random_case(seed):
    """2 to 40 flows over 3 to 20 links; some weigh as their bytes, start later, meet faults."""
    rng = np.random.default_rng([seed, 77])
    links, many = int(rng.integers(3, 21)), int(rng.integers(2, 41))
    capacity = rng.uniform(1, 10, links) * 1e9
    paths = [
        rng.choice(links, size=rng.integers(1, min(6, links) + 1), replace=False).tolist()
        for _ in range(many)
    ]
    size = rng.uniform(1, 40, many) * 1e5
    weight = size / size.mean() if rng.random() < 0.5 else None
    latency = rng.uniform(0, 3e-4, many) if rng.random() < 0.5 else None
    group = flows(size, paths, weight, latency)
    changes = []
    if rng.random() < 0.5:
        whole = finish_times(build("fluid", capacity, CHUNK), [(0.0, "all", group)])["all"].max()
        for _ in range(rng.integers(1, 4)):
            link, begin = int(rng.integers(links)), float(rng.uniform(0, whole))
            factor = float(rng.choice([0.0, 0.3, 0.7, 1.5]))
            changes.append((begin, link, capacity[link] * factor))
            if factor < 1:
                changes.append((begin + float(rng.uniform(0.1, 0.5)) * whole, link, capacity[link]))
    return capacity, group, sorted(changes)


class Case:
    """One case, what the fluid says of it, and what chunks say that links serve `served` times."""

    def __init__(self, seed):
        self.capacity, self.group, self.changes = random_case(seed)
        starts = [(0.0, "all", self.group)]
        self.fluid = finish_times(build("fluid", self.capacity, CHUNK), starts, self.changes)["all"]

    def ends(self, served, queues):
        crossed = (self.group.size * (self.group.links >= 0).sum(axis=1)).sum()
        return ends(self.capacity, self.group, crossed / served, queues, self.changes)

    def flow_errors(self, served, queues):
        """Of single flows, as shares of the makespan."""
        return abs(self.ends(served, queues) - self.fluid) / self.fluid.max()

    def makespan_error(self, served, queues):
        return abs(self.ends(served, queues).max() / self.fluid.max() - 1)


@pytest.fixture(scope="module")
def cases():
    return [Case(seed) for seed in range(200)]


def test_as_chunks_shrink_the_makespan_of_200_random_cases_is_that_of_the_fluid(cases):
    errors = {}
    for served in (2_500, 10_000):
        errors[served] = np.array([case.makespan_error(served, Queues()) for case in cases])
    # Four times finer chunks: the error falls to about a third.
    assert np.median(errors[10_000]) < np.median(errors[2_500]) / 2
    assert np.quantile(errors[10_000], 0.9) < np.quantile(errors[2_500], 0.9)
    # Where that is not fine enough, the next step is.
    coarse = np.flatnonzero(errors[10_000] > 0.015)
    assert len(coarse) <= 20
    errors[10_000][coarse] = [cases[n].makespan_error(40_000, Queues()) for n in coarse]
    assert errors[10_000].max() <= 0.02


def test_as_chunks_shrink_every_flow_ends_when_the_fluid_says(cases):
    some = cases[::10]
    errors = [np.concatenate([case.flow_errors(n, Queues()) for case in some]) for n in COARSE_FINE]
    assert np.median(errors[1]) < min(np.median(errors[0]) / 3, 0.004)
    assert np.quantile(errors[1], 0.95) < 0.02


def test_first_come_first_served_is_not_what_the_fluid_is(cases):
    # Shares by arrival: however fine the chunks, single flows end at quite another time.
    some = cases[::10]
    errors = [np.concatenate([case.flow_errors(n, Queues("fifo")) for case in some]) for n in COARSE_FINE]
    assert np.median(errors[1]) > 0.5 * np.median(errors[0])
    assert np.median(errors[1]) > 0.03


@pytest.mark.parametrize(
    ("queues", "end"),
    [(Queues(), 111.0), (Queues("fifo", window=BLAST), 200.0), (Queues(window=BLAST), 200.0)],
)
def test_a_flow_held_back_further_on_leaves_the_rest_only_if_it_is_made_to(queues, end):
    # A crosses 10 and 1 B/s, B only the link of 10 B/s: max-min fair is 1 and 9, so B's 1000 B take 111 s.
    # Where A may send what it cannot bring through, each gets 5 B/s of the first link.
    group = flows([1000, 1000], [[0, 1], [0]])
    assert ends([10, 1], group, 1.0, queues)[1] == pytest.approx(end, rel=0.01)


# Laws of every way to queue


@every_way
@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_no_exchange_is_faster_than_its_busiest_port_allows(way, seed):
    rng = np.random.default_rng(seed)
    capacity = rng.integers(1, 20, 6) * 1e8
    group = random_flows(rng, 6)
    found = ends(capacity, group, CHUNK, way)
    assert not np.isnan(found).any()
    for link in range(6):
        crossing = (group.links == link).any(axis=1)
        if crossing.any():
            assert found[crossing].max() >= (group.size[crossing].sum() - 10) / capacity[link]


@every_way
@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_every_flow_ends_however_links_fail_and_return(way, seed):
    rng, capacity, starts = random_traffic(seed)
    faults = [
        (float(time), int(rng.integers(len(capacity))), float(rng.integers(0, 20) * 1e8))
        for time in np.sort(rng.uniform(0, 0.02, rng.integers(0, 6)))
    ]
    back = [(0.05, link, float(capacity[link])) for link in range(len(capacity))]
    times = finish_times(Chunked(capacity, CHUNK, way), starts, [*faults, *back])
    assert not any(np.isnan(found).any() for found in times.values())


@every_way
def test_a_flow_stalls_while_its_link_is_down_and_then_goes_on(way):
    # 50 B until 0.5 s, nothing until 2.5 s, the other 50 B until 3 s; the second link is far quicker.
    found = ends([100, 1e9], flows([100], [[0, 1]]), 10.0, way, [(0.5, 0, 0.0), (2.5, 0, 100.0)])
    assert found == pytest.approx([3.0])


def slow_ends(capacity, group, cut_through):
    """Flows of one chunk each, first come first served: reckoned link by link in order of arrival.

    None where two come to a link at one instant, as they may under cut-through when the last byte of
    a third has left two links at once: who is first is not said then.
    """
    came = np.full(len(capacity), -1.0)
    free, found, number = np.zeros(len(capacity)), np.empty(len(group.size)), count()
    coming = sorted((latency, next(number), n, 0, 0.0) for n, latency in enumerate(group.latency))
    while coming:
        time, _, n, hop, whole = heappop(coming)
        path = [link for link in group.links[n] if link >= 0]
        if time - came[path[hop]] < 1e-12:
            return None
        came[path[hop]] = time
        begin = max(time, free[path[hop]])
        free[path[hop]] = end = begin + group.size[n] / capacity[path[hop]]
        assert end >= whole * (1 - 1e-12)
        found[n] = end
        if hop + 1 < len(path):
            early = max(begin, end - group.size[n] / capacity[path[hop + 1]])
            heappush(coming, (early if cut_through else end, next(number), n, hop + 1, end))
    return found


@every_switching
@given(seed=seeds)
@settings(max_examples=100, deadline=None)
def test_first_come_is_first_served_and_no_link_rests_while_chunks_wait(switching, seed):
    rng = np.random.default_rng(seed)
    many, links = int(rng.integers(1, 30)), int(rng.integers(1, 8))
    # Every flow has a first link of its own, as flows take turns there, and begins at a time of its own.
    paths = [
        [links + n, *rng.choice(links, size=rng.integers(1, min(4, links) + 1), replace=False).tolist()]
        for n in range(many)
    ]
    capacity = rng.uniform(1, 10, links + many) * 1e9
    group = flows(rng.uniform(1, 10, many) * 1e5, paths, latency=rng.uniform(0, 1e-3, many))
    expected = slow_ends(capacity, group, switching == "cut_through")
    assume(expected is not None)
    assert ends(capacity, group, 1e6, Queues("fifo", switching)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("queueing", ["fair", "fifo"])
@every_switching
@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_a_link_is_busy_until_all_that_came_is_served(queueing, switching, seed):
    rng = np.random.default_rng(seed)
    many = rng.integers(1, 20)
    size, latency = rng.uniform(1, 40, many) * 1e5, rng.uniform(0, 5e-3, many)
    weight = rng.uniform(1, 10, many)
    found = ends([5e9], flows(size, [[0]] * many, weight, latency), CHUNK, Queues(queueing, switching, 1))
    busy = 0.0
    for n in np.argsort(latency):
        busy = max(busy, latency[n]) + size[n] / 5e9
    assert found.max() == pytest.approx(busy, rel=1e-9)


@every_way
@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_of_two_equal_starts_on_one_path_the_first_ends_first(way, seed):
    rng = np.random.default_rng(seed)
    capacity = rng.integers(1, 20, 5) * 1e8
    group = random_flows(rng, 5, latency=False, shortest=1)
    path = group.links[0][group.links[0] >= 0].tolist()
    one = flows([float(group.size[0])], [path])
    starts = [(0.0, "others", group), (1e-4, "first", one), (2e-4, "second", one)]
    times = finish_times(Chunked(capacity, CHUNK, way), starts)
    assert times["first"][0] <= times["second"][0]


@given(seed=seeds)
@settings(max_examples=100, deadline=None)
def test_on_an_idle_path_cut_through_is_never_later_than_store_and_forward(seed):
    rng = np.random.default_rng(seed)
    capacity = rng.choice([1e8, 3e8, 1e9], rng.integers(1, 7))
    one = flows([rng.uniform(1, 40) * 1e5], [list(range(len(capacity)))])
    stored, cut = (ends(capacity, one, CHUNK, Queues(switching=switching)) for switching in SWITCHING)
    assert cut <= stored * (1 + 1e-12)
    assert cut >= one.size / capacity.min() * (1 - 1e-12)


# Numbers


@pytest.mark.parametrize(
    ("capacity", "stored", "cut"),
    [
        ([10, 10, 10], 3.0, 1.0),  # equal links: the chunk's 10 B take 1 s once
        ([10, 5, 2], 8.0, 5.0),  # ever slower: all begin at once, the last is the slowest
        ([2, 5, 10], 8.0, 5.0),  # ever faster: all end at once, at the end of the slowest
        ([10, 2, 10], 7.0, 5.0),
        ([2, 10, 2], 11.0, 9.0),  # the fast one begins at 4 s, the last with it
    ],
)
def test_a_chunk_is_paid_once_along_an_idle_path_unless_a_faster_link_lies_between(capacity, stored, cut):
    found = [ends(capacity, flows([10], [[0, 1, 2]]), 10.0, Queues("fair", s)) for s in SWITCHING]
    assert np.concatenate(found) == pytest.approx([stored, cut])


def test_a_last_byte_leaves_no_link_before_it_has_left_the_one_before():
    # 10 B at 10 B/s on both; the first link stands still from 0.5 s to 2 s. The second is not kept from
    # serving another's 10 B meanwhile, from 1 s to 2 s.
    group = flows([10, 10], [[0, 1], [1]], latency=[0, 0.9])
    found = ends([10, 10], group, 10.0, Queues("fifo", "cut_through"), [(0.5, 0, 0.0), (2.0, 0, 10.0)])
    assert found == pytest.approx([2.5, 2.0])


def test_a_full_queue_holds_back_what_is_behind_though_its_way_is_free():
    # A and B come by link 0 of 10 B/s; A goes on by link 1 of 1 B/s, B by link 2 of 100 B/s. The buffer
    # before link 1 has room for two chunks of 10 B, so link 0 goes at the pace of link 1.
    group = flows([100, 100], [[0, 1], [0, 2]])
    free, held = (
        ends([10, 1, 100], group, 10.0, Queues("fifo", "store_and_forward", BLAST, buffer))[1]
        for buffer in (0.0, 20.0)
    )
    # Without a bound they alternate: B's tenth chunk leaves link 0 at 20 s and link 2 0.1 s later.
    assert free == pytest.approx(20.1)
    # A's 1st chunk comes to link 1 at 1 s and leaves at 11 s; then every 10 s one of A's gets on to link 0
    # and one of B's follows.  A's 10th begins when the 8th has left, at 81 s; B's 10th ends at 83.1 s.
    assert held == pytest.approx(83.1)


@every_switching
@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_no_queue_holds_more_than_its_buffer(switching, seed):
    rng = np.random.default_rng(seed)
    many, buffer = rng.integers(2, 20), rng.uniform(2, 6) * CHUNK
    # Into one switch, out by a few slow links, through one more: nothing goes in a circle.
    paths = [[rng.integers(4), 4 + rng.integers(2), 6] for _ in range(many)]
    capacity = np.array([4, 4, 4, 4, 2, 2, 1]) * 1e9
    network = Chunked(capacity, CHUNK, Queues("fifo", switching, BLAST, float(buffer)))
    found = finish_times(network, [(0.0, "all", flows(rng.uniform(1, 40, many) * 1e5, paths))])["all"]
    _, rows = network.depths(float(found.max()))
    assert rows[:, 3].max() <= buffer * (1 + 1e-9)


def ring(buffer):
    """Four links in a circle; every flow goes over three of them."""
    group = flows([1000] * 4, [[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1]])
    return ends([10] * 4, group, 10.0, Queues("fifo", "store_and_forward", BLAST, buffer))


def test_full_queues_in_a_circle_are_told_and_not_waited_for():
    with pytest.raises(
        Deadlock, match=r"the full queues of links .* -> .* -> .* wait for each other"
    ) as told:
        ring(20.0)
    assert sorted(told.value.links) == [0, 1, 2, 3]
    assert not np.isnan(ring(0.0)).any()
    assert not np.isnan(ring(3000.0)).any()


# Flows taken out


STOPPING = {"port_bound": PortBound, "fluid": Fluid, "plain fluid": PlainFluid} | {
    name: lambda bandwidth, way=way: Chunked(bandwidth, CHUNK, way) for name, way in WAYS.items()
}


@every_switching
@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_the_room_of_what_is_stopped_is_free_for_others(switching, seed):
    # The links 0 and 2 stand still: they would send into link 1, which is down and full. So does link 4,
    # whose first flow is to be sent there, too; its 20 B fit once the others are stopped.
    rng = np.random.default_rng(seed)
    network = Chunked(
        np.array([100.0, 0.0, 100.0, 100.0, 100.0]), 10.0, Queues("fifo", switching, BLAST, 30.0)
    )
    network.start(flows([500, 500], [[0, 1], [2, 1]]), "stopped", 0.0)
    network.start(flows([500, 500], [[0, 3], [2, 3]]), "kept", 0.0)
    network.start(flows([20, 500], [[4, 1], [4]], latency=[5.0, 5.0]), "third", 0.0)
    stuck = float(rng.uniform(10, 20))
    assert network.finish(stuck) == []
    missing = network.stop("stopped", np.array([0, 1]), stuck)
    assert missing == pytest.approx([500, 500])
    # 1000 B less what had gone by before all stood still, at 100 B/s.
    done = []
    while (now := network.next_finish()) < np.inf:
        done += [(now, key) for key, _ in network.finish(now)]
    assert sorted(key for _, key in done) == ["kept", "kept", "third"]
    assert stuck < done[0][0] and done[-1][0] <= stuck + 10.2
    network.set_capacity(1, 100.0, 100.0)
    assert [key for key, _ in network.finish(101.0)] == ["third"]
    network.start(flows([500], [[0, 1]]), "after", 101.0)
    times = []
    while (now := network.next_finish()) < np.inf:
        times += [(key, now) for key, _ in network.finish(now)]
    assert times == [("after", pytest.approx(106.1 if switching == "store_and_forward" else 106.0))]


@pytest.mark.parametrize("name", STOPPING)
@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_what_had_not_come_of_a_stopped_flow_may_be_sent_anew(name, seed):
    rng, capacity, starts = random_traffic(seed, shortest=1)
    network, running, now = STOPPING[name](capacity), {}, 0.0
    agenda = sorted(
        [(time, "start") for time, _, _ in starts] + [(t, "stop") for t in rng.uniform(0, 0.02, 5)]
    )
    waiting, numbers = sorted(starts, key=lambda start: start[0]), count()
    owed, got = sum(group.size.sum() for _, _, group in starts), 0.0
    while (now := min(agenda[0][0] if agenda else np.inf, network.next_finish())) < np.inf:
        for key, positions in network.finish(now):
            got += running[key].pop_sizes(positions)
        while agenda and agenda[0][0] <= now:
            if agenda.pop(0)[1] == "start":
                _, _, group = waiting.pop(0)
            else:
                live = [(key, flight) for key, flight in running.items() if flight.left]
                if not live:
                    continue
                key, flight = live[rng.integers(len(live))]
                chosen = rng.permutation(sorted(flight.left))[: rng.integers(1, len(flight.left) + 1)]
                missing = network.stop(key, chosen, now)
                sizes = flight.group.size[chosen]
                assert ((missing >= 0) & (missing <= sizes)).all()
                got += float((sizes - missing).sum())
                flight.left -= set(chosen.tolist())
                chosen, missing = chosen[missing > 0], missing[missing > 0]
                if not len(chosen):
                    continue
                paths = [[link for link in path if link >= 0] for path in flight.group.links[chosen].tolist()]
                group = flows(missing, paths)
            key = next(numbers)
            running[key] = Flight(group)
            network.start(group, key, now)
    assert not any(flight.left for flight in running.values())
    assert got == pytest.approx(owed, rel=1e-9)


class Flight:
    """A start and which of its flows are under way."""

    def __init__(self, group):
        self.group, self.left = group, set(range(len(group.size)))

    def pop_sizes(self, positions):
        assert self.left >= set(positions.tolist()), "a flow ends once, and not after it was stopped"
        self.left -= set(positions.tolist())
        return float(self.group.size[positions].sum())


@pytest.mark.parametrize(("name", "missing"), [("port_bound", 75.0), ("fair store_and_forward", 80.0)])
def test_who_is_left_goes_on_without_the_stopped(name, missing):
    # 100 and 300 B share 100 B/s until 1 s; port bound: a quarter of all is through.  Chunks of 10 B take
    # turns, 5 of each are through, and those of A are all of 100 B but 50.
    network = PortBound(np.array([100.0])) if name == "port_bound" else Chunked(np.array([100.0]), 10.0)
    network.start(flows([100, 300], [[0], [0]]), "both", 0.0)
    network.finish(1.0)
    stopped = network.stop("both", np.array([0]), 1.0)
    assert stopped == pytest.approx([missing if name == "port_bound" else 50.0])
    while (now := network.next_finish()) < np.inf:
        last, done = now, network.finish(now)
    assert [(key, where.tolist()) for key, where in done] == [("both", [1])]
    # Port bound: three quarters of the time for 25 + 300 B.  Chunks: 250 B more.
    assert last == pytest.approx(1 + 0.75 * 3.25 if name == "port_bound" else 3.5)


def test_who_ends_as_it_is_stopped_is_not_named_again():
    network = Chunked(np.array([100.0]), 10.0)
    network.start(flows([100], [[0]]), "a", 0.0)
    assert network.stop("a", np.array([0]), 1.0) == pytest.approx([0.0])
    assert network.finish(2.0) == []


# Queue depth


@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_depth_over_time_loses_no_byte_second_and_no_peak(seed):
    rng = np.random.default_rng(seed)
    depth, now, waits, area, peak = Depth(), 0.0, 0.0, 0.0, 0.0
    for _ in range(rng.integers(0, 200)):
        step = float(rng.choice([0.0, 1e-7, 1e-5, 1e-3, 0.1]) * rng.random())
        area += waits * step
        peak = max(peak, waits if step else 0.0)
        now += step
        change = float(rng.integers(-waits, 1000))
        waits += change
        depth.change(change, now)
    end = now + float(rng.uniform(0.01, 1))
    area, peak = area + waits * (end - now), max(peak, waits)
    rows = depth.intervals(end)
    begin, until, mean, most = rows.T
    assert len(rows) <= 256
    assert begin[0] == 0 and until[-1] == end and (begin[1:] == until[:-1]).all() and (until > begin).all()
    assert ((until - begin) * mean).sum() == pytest.approx(area, rel=1e-9, abs=1e-12)
    assert most.max() == peak
    assert (mean <= most * (1 + 1e-9)).all()


def test_what_waits_at_a_meeting_is_what_came_too_much():
    # Two flows of two chunks of 10 B come at 10 B/s each to a link of 10 B/s: at 1 s two chunks, one of
    # them waits until 2 s; then two more come, of which two wait until 3 s and one until 4 s.
    network = Chunked(np.array([10.0, 10.0, 10.0]), 10.0, Queues("fifo"))
    finish_times(network, [(0.0, "both", flows([20, 20], [[0, 2], [1, 2]]))])
    link, rows = network.depths(8.0)
    rows = rows[link == 2]
    assert rows[:, 3].max() == 20
    assert ((rows[:, 1] - rows[:, 0]) * rows[:, 2]).sum() == pytest.approx(10 + 20 + 10)
    assert rows[0].tolist() == [0, pytest.approx(1, abs=0.04), 0, 0]
    assert not len(depths(build("fluid", np.ones(3), CHUNK), 8.0)[0])


# In a scenario


WIDE = {"fidelity": "chunked", "chunk": "16 B"}


def test_a_trace_holds_the_depth_of_queues_over_the_whole_run_where_there_are_queues():
    scenario = tiny(network=WIDE, workload={"sequences": 4})
    trace = trace_of(scenario)
    queues, links = table(trace, "queues"), table(trace, "links")
    window = trace.facts["simulated_seconds"]
    covered = np.bincount(queues["link"], queues["end"] - queues["start"], minlength=len(links["link"]))
    assert covered == pytest.approx(window)
    assert not len(table(trace_of(tiny()), "queues")["link"])
    assert run_scenario(scenario).summary["queues"].keys() == set(links["tier"])
    assert run_scenario(tiny()).summary["queues"] is None


def test_a_scenario_chooses_how_chunks_go_on():
    spans = [
        table(trace_of(tiny(network=WIDE | {"switching": switching, "chunk": "1 kB"})), "spans")
        for switching in SWITCHING
    ]
    stored, cut = (
        s["end"][s["operator"] == "dispatch"] - s["met"][s["operator"] == "dispatch"] for s in spans
    )
    # One chunk over two equal links: paid twice, or once.
    assert stored == pytest.approx(2 * cut)


def test_more_chunks_than_a_run_may_serve_are_refused_before_it_begins(monkeypatch):
    scenario = tiny(network=WIDE, workload={"sequences": 4})
    monkeypatch.setattr(chunked, "MOST_SERVICES", 10)
    with pytest.raises(ScenarioError, match=r"network\.chunk = 16 B: .* at most 10 are; take larger chunks"):
        run_scenario(scenario)
    with pytest.raises(ClustersimError, match="take larger chunks"):
        Chunked(np.ones(1), 10.0).start(flows([1e5], [[0]]), "a", 0.0)


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_services_are_the_chunks_times_the_links_they_cross(seed):
    group = random_flows(np.random.default_rng(seed), 6)
    by_hand = sum(
        max(-(-size // CHUNK), 1) * sum(link >= 0 for link in path)
        for size, path in zip(group.size.tolist(), group.links.tolist(), strict=True)
    )
    assert services(group, CHUNK) == by_hand


def test_a_deadlock_in_a_scenario_names_the_links(monkeypatch):
    def stuck(self, now):
        raise Deadlock((0, 1))

    monkeypatch.setattr(simulation, "_network", lambda scenario, bandwidth: Chunked(bandwidth, 16.0))
    monkeypatch.setattr(Chunked, "finish", stuck)
    with pytest.raises(ScenarioError, match=r"the full queues of gpu0->.* wait for each other in a circle"):
        run_scenario(tiny())


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"buffer": "1 MB"}, 'bounds the queues of queueing "fifo"'),
        ({"buffer": "1 kB", "queueing": "fifo", "chunk": "1 kB"}, "must hold two chunks, 2 kB"),
    ],
)
def test_a_buffer_that_could_do_nothing_is_refused(network, said):
    with pytest.raises(AssertionError, match=said):
        tiny(network=network)
