"""Laws of every network model, numbers of the fluid one, and its judges: a slow loop and the chunks."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.errors import ClustersimError
from clustersim.physics import fidelity
from clustersim.physics.fidelity import NETWORKS, build
from clustersim.physics.fluid import Fluid
from clustersim.physics.maxmin import max_min_rates
from clustersim.physics.network import Flows
from clustersim.physics.plain_fluid import PlainFluid

CHUNK = 50_000.0

seeds = st.integers(0, 2**32 - 1)
every_network = pytest.mark.parametrize("name", NETWORKS)


def flows(size, links, weight=None, latency=None):
    """Flows from lists: paths may differ in length; weight 1 and no latency unless given."""
    count = len(size)
    table = np.full((count, max(1, *map(len, links))), -1, dtype=np.int32)
    for row, path in enumerate(links):
        table[row, : len(path)] = path
    return Flows(
        np.array(size, dtype=float),
        np.ones(count) if weight is None else np.array(weight, dtype=float),
        table,
        np.zeros(count) if latency is None else np.array(latency, dtype=float),
    )


def finish_times(network, starts, changes=()):
    """Runs the clock until nothing moves.

    starts   (time, key, Flows); changes: (time, link, bandwidth)
    Returns  key → float64[F] times, NaN for a flow that never ends; a flow that ends twice fails
    """
    times = {key: np.full(len(group.size), np.nan) for _, key, group in starts}
    agenda = [(start[0], network.start, (start[2], start[1])) for start in starts]
    agenda += [(change[0], network.set_capacity, change[1:]) for change in changes]
    agenda.sort(key=lambda entry: entry[0])
    while (now := min(agenda[0][0] if agenda else np.inf, network.next_finish())) < np.inf:
        for key, positions in network.finish(now):
            assert np.isnan(times[key][positions]).all()
            times[key][positions] = now
        while agenda and agenda[0][0] <= now:
            _, act, arguments = agenda.pop(0)
            act(*arguments, now)
    return times


def random_paths(rng, count, links, shortest=0):
    return [
        rng.choice(links, size=rng.integers(shortest, min(4, links) + 1), replace=False).tolist()
        for _ in range(count)
    ]


def random_flows(rng, links, latency=True, shortest=0):
    """Up to nine flows; they weigh 1 or as their bytes, begin at once or not."""
    count = rng.integers(1, 10)
    size = rng.integers(1, 40, count) * 1e5
    return flows(
        size,
        random_paths(rng, count, links, shortest),
        weight=size if rng.random() < 0.5 else None,
        latency=rng.choice([0.0, 1e-4, 3e-4], count) if latency else None,
    )


def random_traffic(seed, **options):
    """Capacities of a few links and some starts, a few of which begin at the same time."""
    rng = np.random.default_rng(seed)
    capacity = rng.integers(1, 20, rng.integers(1, 9)) * 1e8
    times = rng.choice([0.0, 0.0, 1e-3, 2.5e-3, 7e-3], rng.integers(1, 6))
    starts = [
        (float(time), f"start {n}", random_flows(rng, len(capacity), **options))
        for n, time in enumerate(times)
    ]
    return rng, capacity, starts


# Laws of every model


@every_network
@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_every_flow_ends_once_and_no_sooner_than_its_narrowest_link_allows(name, seed):
    _, capacity, starts = random_traffic(seed)
    times = finish_times(build(name, capacity, CHUNK), starts)
    for start, key, group in starts:
        narrowest = np.append(capacity, np.inf)[group.links].min(axis=1)
        soonest = start + group.latency + (group.size - 0.5) / narrowest
        assert (times[key] >= soonest * (1 - 1e-12)).all()


@every_network
@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_no_start_is_faster_than_its_busiest_port_allows(name, seed):
    rng = np.random.default_rng(seed)
    capacity = rng.integers(1, 20, 6) * 1e8
    group = random_flows(rng, 6)
    ends = finish_times(build(name, capacity, CHUNK), [(0.0, "all", group)])["all"]
    for link in range(6):
        crossing = (group.links == link).any(axis=1)
        if crossing.any():
            assert ends[crossing].max() >= (group.size[crossing].sum() - 10) / capacity[link]


@every_network
@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_the_same_traffic_takes_the_same_time_whatever_the_keys_are_called(name, seed):
    _, capacity, starts = random_traffic(seed)
    once = finish_times(build(name, capacity, CHUNK), starts)
    renamed = [(time, (-number, key), group) for number, (time, key, group) in enumerate(starts)]
    again = finish_times(build(name, capacity, CHUNK), renamed)
    assert all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(once.values(), again.values(), strict=True)
    )


@every_network
@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_without_latency_doubling_every_rate_halves_every_time(name, seed):
    _, capacity, starts = random_traffic(seed, latency=False)
    starts = [(0.0, key, group) for _, key, group in starts]
    times = finish_times(build(name, capacity, CHUNK), starts)
    halves = finish_times(build(name, capacity * 2, CHUNK), starts)
    for key in times:
        assert halves[key] == pytest.approx(times[key] / 2, rel=1e-12)


@every_network
def test_a_flow_without_links_is_done_after_its_latency(name):
    group = flows([1e6, 1e6], [[], []], latency=[0.25, 0.5])
    assert finish_times(build(name, np.ones(1), CHUNK), [(1.0, "here", group)])["here"].tolist() == [
        1.25,
        1.5,
    ]


@every_network
def test_a_start_may_mix_flows_with_and_without_links(name):
    group = flows([100, 100], [[], [0]], latency=[0.5, 0])
    times = finish_times(build(name, np.array([100.0]), 10), [(0.0, "both", group)])
    assert times["both"] == pytest.approx([0.5, 1.0])


@every_network
def test_a_change_of_capacity_counts_from_then_on(name):
    # 400 B at 100 B/s: 100 B in the first second; 300 B are left at 300 B/s.
    network = build(name, np.array([100.0]), 10.0)
    times = finish_times(network, [(0.0, "a", flows([400], [[0]]))], [(1.0, 0, 300.0)])
    assert times["a"] == pytest.approx([2.0])


@every_network
def test_a_flow_stalls_while_its_link_is_down(name):
    # 50 B until 0.5 s, nothing until 2.5 s, the other 50 B until 3 s.
    network = build(name, np.array([100.0]), 10.0)
    times = finish_times(network, [(0.0, "a", flows([100], [[0]]))], [(0.5, 0, 0.0), (2.5, 0, 100.0)])
    assert times["a"] == pytest.approx([3.0])


@every_network
def test_a_flow_over_a_link_that_stays_down_never_ends(name):
    network = build(name, np.array([0.0, 100.0]), 10.0)
    times = finish_times(network, [(0.0, "a", flows([100, 100], [[0], [1]]))])["a"]
    assert np.isnan(times[0])
    assert times[1] == pytest.approx(1.0)


@every_network
def test_a_network_at_rest_expects_nothing(name):
    network = build(name, np.ones(2), CHUNK)
    assert network.next_finish() == np.inf
    assert network.finish(5.0) == []


def test_an_unknown_fidelity_is_answered_with_those_there_are():
    with pytest.raises(ClustersimError, match='did you mean "fluid"'):
        build("fluit", np.ones(1), CHUNK)


# Numbers of the fluid model


def test_a_flow_speeds_up_when_its_neighbour_leaves():
    # A: 100 B and B: 300 B share a 100 B/s link.
    # 0-2 s: 50 B/s each, A ends at 2 s.  B has 200 B left at 100 B/s: ends at 4 s.
    for starts in (
        [(0.0, "both", flows([100, 300], [[0], [0]]))],
        [(0.0, "A", flows([100], [[0]])), (0.0, "B", flows([300], [[0]]))],
    ):
        times = finish_times(Fluid(np.array([100.0])), starts)
        assert np.concatenate(list(times.values())) == pytest.approx([2, 4])


def test_flows_that_weigh_as_their_bytes_end_together():
    # 100 B and 300 B at 25 and 75 B/s.
    group = flows([100, 300], [[0], [0]], weight=[100, 300])
    assert finish_times(Fluid(np.array([100.0])), [(0.0, "a", group)])["a"] == pytest.approx([4, 4])


def test_no_bandwidth_is_used_during_the_latency():
    # A alone for 1 s: 100 B of 200 B.  Then 50 B/s each: A ends at 3 s, B has sent 100 B of 150 B
    # by then and ends 0.5 s later.
    group = flows([200, 150], [[0], [0]], latency=[0, 1])
    assert finish_times(Fluid(np.array([100.0])), [(0.0, "a", group)])["a"] == pytest.approx([3, 3.5])


def test_a_later_start_shares_from_its_start_on():
    # As above, as two starts.
    starts = [(0.0, "A", flows([200], [[0]])), (1.0, "B", flows([150], [[0]]))]
    times = finish_times(Fluid(np.array([100.0])), starts)
    assert [times["A"][0], times["B"][0]] == pytest.approx([3, 3.5])


@pytest.mark.parametrize(("first_link", "rates"), [(1.0, [1, 9]), (10.0, [5, 5])])
def test_a_faster_link_may_slow_somebody(first_link, rates):
    # A crosses links 0 and 1, B only link 1 of 10 B/s: a wider link 0 lets A take from B.
    links = np.array([[0, 1], [1, -1]])
    rate, bottleneck = max_min_rates(np.ones(2), links, np.array([first_link, 10.0]))
    assert rate == pytest.approx(rates)
    assert bottleneck[1] == 1


def test_a_flow_without_links_is_held_back_by_nothing():
    rate, bottleneck = max_min_rates(np.ones(2), np.array([[-1], [0]]), np.array([3.0]))
    assert rate.tolist() == [np.inf, 3.0]
    assert bottleneck.tolist() == [-1, 0]


def test_a_late_call_gets_what_was_done_meanwhile():
    network = Fluid(np.array([100.0]))
    network.start(flows([100, 300], [[0], [0]]), "a", 0.0)
    told = [(key, position) for key, where in network.finish(10.0) for position in where.tolist()]
    assert told == [("a", 0), ("a", 1)]


# Judges of the fluid model


def slow_rates(weight, paths, capacity):
    """Progressive filling, one link at a time: the tightest link fixes the flows that cross it."""
    rate = [np.inf if not path else None for path in paths]
    while None in rate:
        shares = []
        for link, bandwidth in enumerate(capacity):
            crossing = [flow for flow, path in enumerate(paths) if link in path]
            free = sum(weight[flow] for flow in crossing if rate[flow] is None)
            taken = sum(rate[flow] for flow in crossing if rate[flow] is not None)
            if free:
                shares.append((max(bandwidth - taken, 0.0) / free, link))
        share, tightest = min(shares)
        for flow, path in enumerate(paths):
            if rate[flow] is None and tightest in path:
                rate[flow] = weight[flow] * share
    return rate


def slow_finish_times(capacity, starts, changes=()):
    """What finish_times gives, by sharing everything anew at every event."""
    capacity = list(capacity)
    waiting = [
        (
            time + group.latency[n],
            key,
            n,
            group.size[n],
            group.weight[n],
            [k for k in group.links[n] if k >= 0],
        )
        for time, key, group in starts
        for n in range(len(group.size))
    ]
    times = {key: np.full(len(group.size), np.nan) for _, key, group in starts}
    changes, running, now = list(changes), [], 0.0
    while True:
        while changes and changes[0][0] <= now:
            _, link, bandwidth = changes.pop(0)
            capacity[link] = bandwidth
        running += [list(flow) for flow in waiting if flow[0] <= now]
        waiting = [flow for flow in waiting if flow[0] > now]
        for _, key, n, left, _, path in running:
            if left < 1e-3 or not path:
                times[key][n] = now
        running = [flow for flow in running if np.isnan(times[flow[1]][flow[2]])]
        rates = slow_rates([flow[4] for flow in running], [flow[5] for flow in running], capacity)
        events = [now + flow[3] / rate for flow, rate in zip(running, rates, strict=True) if rate]
        events += [flow[0] for flow in waiting] + [change[0] for change in changes[:1]]
        if not events:
            return times
        for flow, rate in zip(running, rates, strict=True):
            flow[3] -= rate * (min(events) - now)
        now = min(events)


@given(seed=seeds)
@settings(max_examples=200, deadline=None)
def test_the_solver_agrees_with_filling_one_link_at_a_time(seed):
    rng = np.random.default_rng(seed)
    capacity = rng.choice([0.0, 1.0, 2.0, 3.5, 10.0], rng.integers(1, 9))
    paths = random_paths(rng, rng.integers(1, 20), len(capacity))
    weight = rng.choice([1.0, 2.0, 7.0, 1e-3, 1e3], len(paths))
    links = flows(weight, paths).links
    rate, _ = max_min_rates(weight, links, capacity)
    assert rate == pytest.approx(slow_rates(weight, paths, capacity), rel=1e-9)


@given(seed=seeds)
@settings(max_examples=100, deadline=None)
def test_every_flow_has_a_full_link_on_which_none_is_faster(seed):
    rng = np.random.default_rng(seed)
    count, links = rng.integers(1, 200), rng.integers(1, 40)
    capacity = rng.uniform(1, 100, links)
    table = flows(np.ones(count), random_paths(rng, count, links, shortest=1)).links
    weight = rng.choice([np.ones(count), rng.uniform(1, 1e6, count)])
    rate, bottleneck = max_min_rates(weight, table, capacity)
    for link in range(links):
        crossing = (table == link).any(axis=1)
        assert rate[crossing].sum() <= capacity[link] * (1 + 1e-9)
        held = bottleneck == link
        if held.any():
            assert rate[crossing].sum() >= capacity[link] * (1 - 1e-9)
            fastest = (rate[crossing] / weight[crossing]).max()
            assert (rate[held] / weight[held] >= fastest * (1 - 1e-9)).all()
    assert all(bottleneck[row] in table[row] for row in range(count))


@pytest.mark.parametrize("model", [Fluid, PlainFluid])
@given(seed=seeds)
@settings(max_examples=100, deadline=None)
def test_the_fluid_model_agrees_with_sharing_everything_anew_at_every_event(model, seed):
    rng, capacity, starts = random_traffic(seed)
    changes = [
        (float(time), int(rng.integers(len(capacity))), float(rng.integers(0, 20) * 1e8))
        for time in np.sort(rng.uniform(0, 0.02, rng.integers(0, 4)))
    ]
    fast = finish_times(model(capacity), starts, changes)
    slow = slow_finish_times(capacity, starts, changes)
    for key in slow:
        assert fast[key] == pytest.approx(slow[key], rel=1e-8, nan_ok=True)


def crowded_traffic(seed):
    """A few hundred flows over a few dozen links, in starts that overlap, weighing 1 or as their bytes."""
    rng = np.random.default_rng(seed)
    links = int(rng.integers(4, 40))
    capacity = rng.choice([1e9, 2e9, 5e9, 25e9], links)
    starts = []
    for number in range(rng.integers(1, 6)):
        count = int(rng.integers(1, 80))
        size = rng.lognormal(13, 1.5, count)
        latency = rng.choice([0.0, 1e-6, 3e-6]) + np.zeros(count)
        weight = size if rng.random() < 0.5 else None
        paths = random_paths(rng, count, links, shortest=1)
        group = flows(size, paths, weight=weight, latency=latency)
        starts.append((float(rng.uniform(0, 2e-3)), number, group))
    return rng, capacity, starts


@pytest.mark.parametrize("tolerance", [0.0, 0.01])
@pytest.mark.parametrize("seed", range(25))
def test_the_compiled_model_gives_the_numbers_of_the_plain_one(seed, tolerance):
    rng, capacity, starts = crowded_traffic(seed)
    changes = [
        (float(time), int(rng.integers(len(capacity))), float(rng.choice([0.0, 1e9, 3e9])))
        for time in np.sort(rng.uniform(0, 3e-3, 4))
    ]
    compiled = finish_times(Fluid(capacity, tolerance), starts, changes)
    plain = finish_times(PlainFluid(capacity, tolerance), starts, changes)
    for key in plain:
        assert compiled[key] == pytest.approx(plain[key], rel=1e-7, nan_ok=True)


@pytest.mark.parametrize("seed", range(1000))
def test_at_any_time_every_flow_has_a_full_link_on_which_none_is_faster(seed):
    rng, capacity, starts = crowded_traffic(seed)
    network = Fluid(capacity)
    for time, key, group in sorted(starts, key=lambda start: start[0]):
        network.start(group, key, time)
    for _ in range(int(rng.integers(1, 40))):
        now = network.next_finish()
        if now < np.inf:
            network.finish(now)
            network.next_finish()
    rate, weight, links = [], [], []
    for _, key, group in starts:
        if key in network.in_flight():
            rate.append(network.rates(key))
            weight.append(group.weight)
            links += group.links.tolist()
    if not rate:
        return
    rate, weight = np.concatenate(rate), np.concatenate(weight)
    used = np.zeros(len(capacity))
    fastest = np.zeros(len(capacity))
    for row, path in enumerate(links):
        for link in path:
            if link >= 0:
                used[link] += rate[row]
                fastest[link] = max(fastest[link], rate[row] / weight[row])
    assert (used <= capacity * (1 + 1e-9)).all()
    full = used >= capacity * (1 - 1e-9)
    for row, path in enumerate(links):
        if rate[row] > 0:
            assert any(
                full[link] and rate[row] / weight[row] >= fastest[link] * (1 - 1e-9)
                for link in path
                if link >= 0
            )


@pytest.mark.parametrize("model", [Fluid, PlainFluid])
def test_who_comes_as_another_leaves_gets_the_same_share(model):
    # A and B have 50 B/s each until 2 s; C and D come at that very moment and end at 4 s.
    pair = flows([100, 100], [[0], [0]])
    times = finish_times(model(np.array([100.0])), [(0.0, "first", pair), (2.0, "then", pair)])
    assert [*times["first"], *times["then"]] == pytest.approx([2, 2, 4, 4])


# Completions taken together


def worst_error(starts, capacity, tolerance):
    """Largest error of any flow's duration, and of the makespan, relative, of flows that start at 0."""
    exact = finish_times(Fluid(capacity), starts)
    near = finish_times(Fluid(capacity, tolerance), starts)
    pairs = [(near[key], exact[key]) for key in exact]
    each = max(float(np.abs(a / b - 1).max()) for a, b in pairs)
    whole = abs(max(a.max() for a, _ in pairs) / max(b.max() for _, b in pairs) - 1)
    return each, whole


@pytest.mark.parametrize("tolerance", [0.0005, 0.002, 0.01, 0.05])
def test_taking_completions_together_costs_about_the_tolerance(tolerance):
    """The bound is one on the bytes, not on the times: measured, times are off by about as much."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        capacity, group = all_to_all(rng, ranks=16, leaves=4)
        alone = Flows(group.size, np.ones(len(group.size)), group.links, group.latency)
        each, whole = worst_error([(0.0, "all", alone)], capacity, tolerance)
        assert whole <= tolerance
        assert each <= 2 * tolerance


@given(seed=seeds, tolerance=st.floats(0, 0.3))
@settings(max_examples=50, deadline=None)
def test_on_one_link_taking_completions_together_delays_no_flow_by_more_than_the_tolerance(seed, tolerance):
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 1000, rng.integers(1, 20)) * 1e3
    start = [(0.0, "all", flows(size, [[0]] * len(size)))]
    exact = finish_times(Fluid(np.array([1e6])), start)["all"]
    near = finish_times(Fluid(np.array([1e6]), tolerance), start)["all"]
    assert (near >= exact * (1 - 1e-9)).all()
    assert (near <= exact * (1 + tolerance + 1e-9)).all()


def kept_shares(capacity, group, tolerance):
    """Flows that start at 0, each: when it ended, when others were given its share, and its last rate."""
    network = Fluid(capacity, tolerance)
    network.start(group, "all", 0.0)
    ended, given, rate = np.full((3, len(group.size)), np.nan)
    now = network.next_finish()
    shared = network._state.totals["shared"][0]
    while now < np.inf:
        rates = network.rates("all")
        for _, positions in network.finish(now):
            ended[positions], rate[positions] = now, rates[positions]
        upcoming = network.next_finish()
        if network._state.totals["shared"][0] > shared or upcoming == np.inf:
            shared = network._state.totals["shared"][0]
            given[np.isnan(given) & ~np.isnan(ended)] = now
        now = upcoming
    return ended, given, rate


@pytest.mark.parametrize("tolerance", [0.002, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(20))
def test_a_run_with_tolerance_is_the_exact_run_of_flows_with_up_to_that_much_more_to_send(seed, tolerance):
    rng = np.random.default_rng(seed)
    capacity = rng.choice([1e9, 2e9, 5e9], 12)
    size = rng.lognormal(13, 1, 60)
    group = flows(size, random_paths(rng, 60, 12, shortest=1))
    ended, given, rate = kept_shares(capacity, group, tolerance)
    more = rate * (given - ended)
    assert (more <= tolerance * size * (1 + 1e-9)).all()
    assert more.max() > 0 or tolerance < 0.01
    longer = Flows(size + more, group.weight, group.links, group.latency)
    exact = finish_times(Fluid(capacity), [(0.0, "all", longer)])["all"]
    assert exact == pytest.approx(given, rel=1e-8)


def test_a_flow_that_ended_keeps_its_share_no_longer_than_the_tolerance_allows():
    # 100, 102 and 300 B at 1/3 of 300 B/s each; A and B end at 1 s and 1.02 s. Within 5 % of its
    # bytes A may keep its share till 1.05 s, so B still ends at 1.02 s, and only then C has the link:
    # 300 - 102 = 198 B at 300 B/s. Exactly, B would have 150 B/s from 1 s on.
    start = [(0.0, "all", flows([100, 102, 300], [[0]] * 3))]
    near = finish_times(Fluid(np.array([300.0]), 0.05), start)["all"]
    assert near == pytest.approx([1.0, 1.02, 1.68])
    exact = finish_times(Fluid(np.array([300.0])), start)["all"]
    assert exact == pytest.approx([1.0, 1 + 2 / 150, 1 + 2 / 150 + (200 - 2) / 300])


@pytest.mark.parametrize("model", [Fluid, PlainFluid])
def test_a_change_that_nobody_feels_makes_nobody_hurry(model):
    # As above, but a link without flows changes at 0.5 s.
    start = [(0.0, "all", flows([100, 102, 300], [[0]] * 3))]
    near = finish_times(model(np.array([300.0, 1.0]), 0.05), start, [(0.5, 1, 2.0)])["all"]
    assert near == pytest.approx([1.0, 1.02, 1.68])


# Flows taken out


@pytest.mark.parametrize("model", [Fluid, PlainFluid])
@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_what_is_stopped_and_sent_anew_arrives_as_if_nothing_had_been(model, seed):
    _, capacity, starts = random_traffic(seed)
    undisturbed = finish_times(model(capacity), starts)
    (time, key, group), *others = starts
    network = model(capacity)
    network.start(group, key, time)
    late = time + float(group.latency.max()) + 1e-4
    gone = {int(p) for _, positions in network.finish(late) for p in positions}
    stays = np.array([p for p in range(len(group.size)) if p not in gone])
    if not len(stays) or (others and min(start[0] for start in others) <= late):
        return
    left = network.stop(key, stays, late)
    assert (left <= group.size[stays]).all()
    again = Flows(np.maximum(left, 1e-9), group.weight[stays], group.links[stays], np.zeros(len(stays)))
    times = finish_times(network, [(late, "again", again), *others])
    assert times["again"] == pytest.approx(undisturbed[key][stays], rel=1e-6)
    for other in others:
        assert times[other[1]] == pytest.approx(undisturbed[other[1]], rel=1e-6)


@pytest.mark.parametrize("model", [Fluid, PlainFluid])
def test_what_is_stopped_before_it_begins_has_all_its_bytes_left_and_is_never_told_done(model):
    network = model(np.array([100.0]))
    network.start(flows([100, 300], [[0], [0]], latency=[1.0, 1.0]), "a", 0.0)
    assert network.stop("a", np.array([1]), 0.5).tolist() == [300.0]
    # Alone on the link from 1 s on.
    told = []
    while (now := network.next_finish()) < np.inf:
        told += [(now, key, positions.tolist()) for key, positions in network.finish(now)]
    assert told == [(pytest.approx(2.0), "a", [0])]


@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_flows_may_be_handed_over_together_or_one_by_one(seed):
    rng = np.random.default_rng(seed)
    capacity = rng.integers(1, 20, 6) * 1e8
    group = random_flows(rng, 6)
    rows = [
        Flows(group.size[[n]], group.weight[[n]], group.links[[n]], group.latency[[n]])
        for n in range(len(group.size))
    ]
    together = finish_times(Fluid(capacity), [(0.0, "all", group)])["all"]
    order = rng.permutation(len(rows))
    single = finish_times(Fluid(capacity), [(0.0, int(n), rows[n]) for n in order])
    assert [single[n][0] for n in range(len(rows))] == pytest.approx(together, rel=1e-5)


@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_what_was_there_before_a_start_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    capacity = rng.integers(1, 20, 12) * 1e8
    group, other = random_flows(rng, 6), random_flows(rng, 6)
    elsewhere = Flows(
        other.size, other.weight, np.where(other.links >= 0, other.links + 6, -1), other.latency
    )
    fresh = finish_times(Fluid(capacity), [(0.0, "a", group)])["a"]
    network = Fluid(capacity)
    starts = [(0.0, 0, group), (64.0, 1, group), (64.0, "other", elsewhere), (128.0, 2, group)]
    times = finish_times(network, starts)
    for n, start in enumerate((0.0, 64.0, 128.0)):
        assert times[n] - start == pytest.approx(fresh, rel=1e-9, abs=1e-12)
    slower = finish_times(
        network, [(256.0, "a", group)], [(200.0, link, capacity[link] / 2) for link in range(6)]
    )
    halved = Fluid(np.append(capacity[:6] / 2, capacity[6:]))
    assert slower["a"] - 256.0 == pytest.approx(
        finish_times(halved, [(0.0, "a", group)])["a"], rel=1e-9, abs=1e-12
    )


def test_a_start_that_meets_the_same_flows_again_shares_with_them():
    # Both cross one 100 B/s link: 50 B/s each from 0.5 s on.
    group, network = flows([100], [[0]]), Fluid(np.array([100.0]))
    finish_times(network, [(0.0, "before", group)])
    times = finish_times(network, [(10.0, "a", group), (10.5, "b", group)])
    assert [times["a"][0], times["b"][0]] == pytest.approx([11.5, 12.0])


# The chunks judge the fluid


def all_to_all(rng, ranks, leaves):
    """Uneven exchange over ports and one up- and downlink per leaf; capacities and flows."""
    capacity = np.concatenate([np.full(2 * ranks, 1e9), np.full(2 * leaves, ranks / leaves * 0.5e9)])
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    per = ranks // leaves
    paths = [
        [a, ranks + b]
        if a // per == b // per
        else [a, 2 * ranks + a // per, 2 * ranks + leaves + b // per, ranks + b]
        for a, b in pairs
    ]
    size = rng.integers(1, 20, len(pairs)) * 1e5
    return capacity, flows(size, paths, weight=size)


@pytest.mark.parametrize("seed", range(5))
def test_chunk_by_chunk_an_all_to_all_takes_as_long_as_the_fluid_says(seed):
    capacity, group = all_to_all(np.random.default_rng(seed), ranks=12, leaves=3)
    ends = {
        name: finish_times(build(name, capacity, 10_000.0), [(0.0, "all", group)])["all"].max()
        for name in NETWORKS
    }
    assert ends["chunked"] == pytest.approx(ends["fluid"], rel=0.1)
    assert ends["chunked"] >= ends["port_bound"] * (1 - 1e-9)
    assert ends["fluid"] >= ends["port_bound"] * (1 - 1e-6)


def test_chunks_of_equal_flows_take_turns():
    # 10 B chunks on a 100 B/s link: A's last is the 19th, B's last the 40th.
    group = flows([100, 300], [[0], [0]])
    times = finish_times(build("chunked", np.array([100.0]), 10.0), [(0.0, "both", group)])["both"]
    assert times == pytest.approx([1.9, 4.0])


def test_chunks_of_flows_that_weigh_as_their_bytes_keep_the_same_fraction():
    # 2 chunks and 6 chunks of 10 B: the turns are at 1/4, 3/4 and at 1/12, 3/12 ... 11/12.
    group = flows([20, 60], [[0], [0]], weight=[20, 60])
    times = finish_times(build("chunked", np.array([10.0]), 10.0), [(0.0, "both", group)])["both"]
    assert times[1] == pytest.approx(8.0)
    assert 6.0 <= times[0] <= 7.1


def test_a_chunk_is_stored_before_it_is_forwarded():
    # Two links of 10 B/s, two chunks of 10 B: the last is through the first link at 2 s, the second at 3 s.
    times = finish_times(build("chunked", np.full(2, 10.0), 10.0), [(0.0, "a", flows([20], [[0, 1]]))])
    assert times["a"] == pytest.approx([3.0])


# What the first run waits for


def test_who_waits_for_the_first_flows_is_told_why(monkeypatch, tmp_path):
    kept = SimpleNamespace(stats=SimpleNamespace(cache_path=str(tmp_path)))
    monkeypatch.setattr(fidelity.sharing, "advance", kept)
    monkeypatch.setattr(fidelity, "COMPILES", True)
    assert "compiled, once" in fidelity.wait("fluid")
    (tmp_path / "sharing.advance-1.py311.nbi").touch()
    assert fidelity.wait("fluid") == ""
    monkeypatch.setattr(fidelity, "COMPILES", False)
    assert "numba cannot be imported" in fidelity.wait("fluid")
    assert fidelity.wait("port_bound") == fidelity.wait("chunked") == ""


def test_without_numba_everything_is_there_but_slow():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np\n"
        "from clustersim.physics.fidelity import build\n"
        "from clustersim.physics.network import Flows\n"
        "network = build('fluid', np.array([100.0]), 1.0)\n"
        "one = np.ones(1)\n"
        "network.start(Flows(100 * one, one, np.zeros((1, 1), dtype=np.int32), 0 * one), 'a', 0.0)\n"
        "print(type(network).__name__, network.next_finish())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["PlainFluid", "1.0"]
