"""The compiled kernel of the fluid model: flows begin, share links max-min fairly, and end.

Written in the part of Python that numba compiles; without numba it runs as it stands, slowly. It
knows slots and link numbers only; `physics/fluid.py` says which start a slot belongs to.

How rates are kept. Every link l has a level: the most rate per weight that it grants, infinite
while it is not full. A flow's level is the least of its links', its bottleneck the link that says
so. This is max-min fair just when each link's level is the one that fills it, given what the other
links grant its flows (Charny, Clark, Jain, ICC 1995, call it the advertised rate). When flows begin
or end only the levels of their links are in doubt. Links in doubt are settled from the lowest level
upwards, as progressive filling does; a link whose level moves puts those in doubt whose flows it
moved. What nothing leads to is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

try:
    import numba
except ImportError:  # pragma: no cover - the plain run of the same code is tested without a jit
    numba = None

F = TypeVar("F", bound=Callable[..., Any])

#: A flow is done when less than this share of its bytes is left: roundoff, not a tolerance.
DONE = 1e-9

#: Levels that differ by less, relatively, are the same: it keeps roundoff from travelling.
SAME = 1e-9

#: A link that carries less than this share of its capacity cannot be anyone's bottleneck.
_SLACK = 1 - 1e-9

#: After so many changes the rates on a link are summed up anew, lest roundoff add up.
_STALE = 1024

#: The two heaps of links: those in doubt, by level; those with own flows, by when the first ends.
DOUBT, ENDS = range(2)


def compiled(function: F) -> F:
    """The function as machine code, kept on disk between runs; as it stands where there is no numba."""
    if numba is None:
        return function
    made: F = numba.njit(cache=True)(function)
    return made


def _records(**fields: str) -> np.dtype:
    return np.dtype(list(fields.items()))


LINK = _records(capacity='f8', level='f8', own='f8', held='f8', top='f8', crossing='i8', owned='i8', fresh='i8', stale='i8', head='i8', first='i8', marked='i8', touched='i8', mark='?', moved='?')
HEAP = _records(rank='f8', entry='i8', place='i8')
FLOW = _records(size='f8', weight='f8', left='f8', stamp='f8', share='f8', bottleneck='i8', next_own='i8', last_own='i8')
PLACE = _records(after='i8', before='i8')
QUEUE = _records(time='f8', number='i8', slot='i8', chain='i8', free='i8', done='i8', done_time='f8')
TOTAL = _records(now='f8', due='f8', doubted='i8', ending='i8', coming='i8', free='i8', done='i8', moving='i8', evaluated='i8', fitted='i8', number='i8', marked='i8', touched='i8', shared='i8')


class State(NamedTuple):
    links: np.ndarray
    heaps: np.ndarray
    flows: np.ndarray
    path: np.ndarray
    places: np.ndarray
    work: np.ndarray
    queue: np.ndarray
    totals: np.ndarray


@compiled
def _less(heaps, which, a, b):
    first, second = heaps[which, a].rank, heaps[which, b].rank
    return first < second or (first == second and a < b)


@compiled
def _up(heaps, which, at):
    link = heaps[which, at].entry
    while at > 0:
        parent = (at - 1) >> 1
        other = heaps[which, parent].entry
        if not _less(heaps, which, link, other):
            break
        heaps[which, at].entry = other
        heaps[which, other].place = at
        at = parent
    heaps[which, at].entry = link
    heaps[which, link].place = at


@compiled
def _down(heaps, which, at, length):
    link = heaps[which, at].entry
    while True:
        child = 2 * at + 1
        if child >= length:
            break
        if child + 1 < length and _less(heaps, which, heaps[which, child + 1].entry, heaps[which, child].entry):
            child += 1
        other = heaps[which, child].entry
        if not _less(heaps, which, other, link):
            break
        heaps[which, at].entry = other
        heaps[which, other].place = at
        at = child
    heaps[which, at].entry = link
    heaps[which, link].place = at


@compiled
def _take(heaps, which, at, length):
    """Removes the entry at a place of a heap of `length` entries."""
    last = length - 1
    heaps[which, heaps[which, at].entry].place = -1
    if at < last:
        link = heaps[which, last].entry
        heaps[which, at].entry = link
        heaps[which, link].place = at
        _down(heaps, which, at, last)
        _up(heaps, which, heaps[which, link].place)


@compiled
def doubt(heaps, totals, link: int, key: float) -> None:
    """A link's level may no longer be right, from this level on."""
    at = heaps[DOUBT, link].place
    if at < 0:
        at = totals[0].doubted
        totals[0].doubted += 1
        heaps[DOUBT, link].rank = key
        heaps[DOUBT, at].entry = link
        _up(heaps, DOUBT, at)
    elif key < heaps[DOUBT, link].rank:
        heaps[DOUBT, link].rank = key
        _up(heaps, DOUBT, at)


@compiled
def _mark(links, totals, link: int) -> None:
    if not links[link].mark:
        links[link].mark = True
        links[totals[0].marked].marked = link
        totals[0].marked += 1


@compiled
def _guess(links, link: int) -> float:
    """The level that fills a link if nobody's bottleneck changes; inf if it has no flow of its own."""
    if links[link].owned == 0:
        return np.inf
    return max(links[link].capacity - links[link].held, 0.0) / links[link].own


@compiled
def _least(links, path, slot: int, but: int) -> float:
    """The least level of a flow's links but one."""
    least = np.inf
    for hop in range(path.shape[1]):
        link = path[slot, hop]
        if link < 0:
            break
        if link != but and links[link].level < least:
            least = links[link].level
    return least


@compiled
def _filling(links, flows, path, places, work, totals, link: int) -> float:
    """The level that fills a link, given what the other links grant its flows; inf if none does."""
    totals[0].evaluated += 1
    if links[link].fresh == 0 and links[link].stale < _STALE:
        guess = _guess(links, link)
        if guess < np.inf:
            if guess >= links[link].top:
                return guess
        elif links[link].held <= links[link].capacity * (1 + SAME):
            return np.inf
    return _fitted(links, flows, path, places, work, totals, link)


@compiled
def _fitted(links, flows, path, places, work, totals, link: int) -> float:
    """`_filling`, flow by flow; sums up the link anew."""
    totals[0].fitted += 1
    width = path.shape[1]
    n = 0
    heft = 0.0
    wanted = 0.0
    own = 0.0
    elsewhere = 0.0
    top = 0.0
    place = links[link].head
    while place >= 0:
        slot = place // width
        weight = flows[slot].weight
        bottleneck = flows[slot].bottleneck
        if bottleneck >= 0 and bottleneck != link:
            cap = flows[slot].share
            elsewhere += weight * cap
            top = max(top, cap)
        else:
            cap = _least(links, path, slot, link)
            if bottleneck >= 0:
                own += weight
        work[n, 0] = cap
        work[n, 1] = weight
        n += 1
        heft += weight
        wanted += weight * cap
        place = places[place].after
    links[link].own, links[link].held, links[link].top, links[link].stale = own, elsewhere, top, 0
    capacity = links[link].capacity
    if wanted <= capacity * (1 + SAME):
        return np.inf
    # Newton's method on a concave function made of straight pieces: from anywhere one step leads
    # below the answer, from there on upwards. More flows are held elsewhere at each step, or none.
    low = capacity / heft
    level = links[link].level if links[link].level < np.inf else low
    held_first = -1
    held_before = -1
    while True:
        held = 0
        granted = 0.0
        rest = 0.0
        for i in range(n):
            if work[i, 0] < level:
                held += 1
                granted += work[i, 1] * work[i, 0]
            else:
                rest += work[i, 1]
        if held == held_first or (held_first >= 0 and held <= held_before):
            return level
        if held == n or granted > capacity:
            if held_first >= 0:
                return level
            held = 0
            level = low
        else:
            level = max(low, (capacity - granted) / rest)
        if held_first >= 0:
            held_before = held
        else:
            held_first = held


@compiled
def _settle(flows, totals, slot: int) -> None:
    """Counts what a flow has sent so far, before its rate changes."""
    now = totals[0].now
    if flows[slot].stamp < now:
        sent = flows[slot].share * flows[slot].weight * (now - flows[slot].stamp)
        flows[slot].left = max(flows[slot].left - sent, 0.0)
        flows[slot].stamp = now


@compiled
def _disown(links, flows, slot: int, link: int) -> None:
    before, after = flows[slot].last_own, flows[slot].next_own
    if before >= 0:
        flows[before].next_own = after
    else:
        links[link].first = after
    if after >= 0:
        flows[after].last_own = before
    links[link].owned -= 1
    links[link].own = links[link].own - flows[slot].weight if links[link].owned else 0.0


@compiled
def _adopt(links, flows, slot: int, link: int) -> None:
    first = links[link].first
    flows[slot].last_own = -1
    flows[slot].next_own = first
    if first >= 0:
        flows[first].last_own = slot
    links[link].first = slot
    links[link].owned += 1
    links[link].own += flows[slot].weight


@compiled
def _question(links, heaps, totals, link: int) -> None:
    """Something about the flows of a link has changed: is its level still right?"""
    if links[link].level < np.inf or links[link].owned > 0:
        doubt(heaps, totals, link, _guess(links, link))
    elif links[link].held > links[link].capacity * _SLACK:
        doubt(heaps, totals, link, links[link].top)


@compiled
def _narrow(links, flows, path, totals, slot: int, by: int) -> None:
    """Gives a flow the least level of its links; `by` is the link whose level has just changed."""
    width = path.shape[1]
    least = np.inf
    narrowest = -1
    for hop in range(width):
        link = path[slot, hop]
        if link < 0:
            break
        if links[link].level < least:
            least = links[link].level
            narrowest = link
    before, old = flows[slot].bottleneck, flows[slot].share
    if narrowest < 0 or (narrowest == before and abs(least - old) <= SAME * least):
        # Without a narrowest one, no link of its path is known to be full yet; one in doubt will be.
        return
    _settle(flows, totals, slot)
    weight = flows[slot].weight
    flows[slot].share = least
    flows[slot].bottleneck = narrowest
    _mark(links, totals, narrowest)
    if before != narrowest:
        if before >= 0:
            _mark(links, totals, before)
            _disown(links, flows, slot, before)
        _adopt(links, flows, slot, narrowest)
    for hop in range(width):
        link = path[slot, hop]
        if link < 0:
            break
        if before < 0:
            links[link].fresh -= 1
        elif link != before:
            links[link].held -= weight * old
        if link != narrowest:
            links[link].held += weight * least
            links[link].top = max(links[link].top, least)
        links[link].stale += 1
        if not links[link].moved and (link != by or narrowest != by):
            links[link].moved = True
            links[totals[0].touched].touched = link
            totals[0].touched += 1


@compiled
def _grant(links, heaps, flows, path, places, totals, link: int, level: float) -> None:
    """Gives a link its level, and its flows the least of theirs."""
    links[link].level = level
    slot = links[link].first
    while slot >= 0:
        following = flows[slot].next_own
        _narrow(links, flows, path, totals, slot, link)
        slot = following
    if links[link].fresh > 0 or level < links[link].top:
        width = path.shape[1]
        place = links[link].head
        while place >= 0:
            slot = place // width
            if flows[slot].bottleneck == -1 or level < flows[slot].share:
                _narrow(links, flows, path, totals, slot, link)
            place = places[place].after
    for at in range(totals[0].touched):
        other = links[at].touched
        links[other].moved = False
        _question(links, heaps, totals, other)
    totals[0].touched = 0


@compiled
def _look_up_end(links, heaps, flows, totals, link: int) -> None:
    """Notes when the first flow ends whose bottleneck this link is."""
    end = np.inf
    slot = links[link].first
    while slot >= 0:
        if flows[slot].share > 0:
            end = min(end, flows[slot].stamp + flows[slot].left / (flows[slot].share * flows[slot].weight))
        slot = flows[slot].next_own
    _expect(heaps, totals, link, end)


@compiled
def _expect(heaps, totals, link: int, end: float) -> None:
    at = heaps[ENDS, link].place
    heaps[ENDS, link].rank = end
    if end == np.inf:
        if at >= 0:
            _take(heaps, ENDS, at, totals[0].ending)
            totals[0].ending -= 1
        return
    if at < 0:
        at = totals[0].ending
        totals[0].ending += 1
        heaps[ENDS, at].entry = link
        heaps[ENDS, link].place = at
    _up(heaps, ENDS, at)
    _down(heaps, ENDS, heaps[ENDS, link].place, totals[0].ending)


@compiled
def share_out(links, heaps, flows, path, places, work, totals) -> None:
    """Settles every link in doubt, from the lowest level upwards. Rates are max-min fair then."""
    totals[0].shared += 1
    while totals[0].doubted > 0:
        link = heaps[DOUBT, 0].entry
        key = heaps[DOUBT, link].rank
        level = _filling(links, flows, path, places, work, totals, link) if links[link].crossing > 0 else np.inf
        if level > key * (1 + SAME) and totals[0].doubted > 1:
            # A link with a lower level may still hold back some of its flows: that one first.
            second = heaps[DOUBT, heaps[DOUBT, 1].entry].rank
            if totals[0].doubted > 2:
                second = min(second, heaps[DOUBT, heaps[DOUBT, 2].entry].rank)
            if level > second:
                heaps[DOUBT, link].rank = level
                _down(heaps, DOUBT, 0, totals[0].doubted)
                continue
        _take(heaps, DOUBT, 0, totals[0].doubted)
        totals[0].doubted -= 1
        old = links[link].level
        if level != old and (level == np.inf or old == np.inf or abs(level - old) > SAME * old):
            _grant(links, heaps, flows, path, places, totals, link, level)
    for at in range(totals[0].marked):
        link = links[at].marked
        links[link].mark = False
        _look_up_end(links, heaps, flows, totals, link)
    totals[0].marked = 0
    totals[0].due = np.inf


@compiled
def _finish(queue, totals, slot: int) -> None:
    queue[totals[0].done].done = slot
    queue[totals[0].done].done_time = totals[0].now
    totals[0].done += 1


@compiled
def _begin(links, heaps, flows, path, places, queue, totals, slot: int) -> None:
    """A flow's latency is over: it takes its place on its links."""
    width = path.shape[1]
    flows[slot].left = flows[slot].size
    flows[slot].stamp = totals[0].now
    flows[slot].share = 0.0
    flows[slot].bottleneck = -1
    if path[slot, 0] < 0:
        flows[slot].bottleneck = -2
        _finish(queue, totals, slot)
        return
    totals[0].moving += 1
    for hop in range(width):
        link = path[slot, hop]
        if link < 0:
            break
        place = slot * width + hop
        first = links[link].head
        places[place].before = -1
        places[place].after = first
        if first >= 0:
            places[first].before = place
        links[link].head = place
        links[link].crossing += 1
        links[link].fresh += 1
        doubt(heaps, totals, link, 0.0)


@compiled
def leave(links, heaps, flows, path, places, totals, slot: int) -> None:
    """Takes a flow off its links; they are in doubt if it took some of what others want."""
    width = path.shape[1]
    _settle(flows, totals, slot)
    bottleneck = flows[slot].bottleneck
    totals[0].moving -= 1
    if bottleneck >= 0:
        _mark(links, totals, bottleneck)
        _disown(links, flows, slot, bottleneck)
    for hop in range(width):
        link = path[slot, hop]
        if link < 0:
            break
        place = slot * width + hop
        before, after = places[place].before, places[place].after
        if before >= 0:
            places[before].after = after
        else:
            links[link].head = after
        if after >= 0:
            places[after].before = before
        links[link].crossing -= 1
        links[link].stale += 1
        if bottleneck < 0:
            links[link].fresh -= 1
        elif link != bottleneck:
            links[link].held -= flows[slot].weight * flows[slot].share
        if links[link].crossing == 0:
            links[link].held = 0.0
            links[link].top = 0.0
        if links[link].level < np.inf:
            doubt(heaps, totals, link, links[link].level)
    flows[slot].bottleneck = -2


@compiled
def _end(links, heaps, flows, path, places, queue, totals, link: int, tolerance: float) -> None:
    """The flows that end now, among those whose bottleneck a link is.

    They keep their share until the next sharing out, which is due before any of them could have
    sent `tolerance` of its bytes once more.
    """
    now = totals[0].now
    following = links[link].first
    while following >= 0:
        slot = following
        following = flows[slot].next_own
        if flows[slot].share <= 0:
            continue
        rate = flows[slot].share * flows[slot].weight
        end = flows[slot].stamp + flows[slot].left / rate
        if end <= now or (end - now) * rate < DONE * flows[slot].size:
            totals[0].due = min(totals[0].due, now + tolerance * flows[slot].size / rate)
            leave(links, heaps, flows, path, places, totals, slot)
            _finish(queue, totals, slot)


@compiled
def announce(queue, totals, time: float, slot: int) -> None:
    """A flow (and those chained to it) will begin at a time."""
    at = totals[0].coming
    totals[0].coming += 1
    number = totals[0].number
    totals[0].number += 1
    while at > 0:
        parent = (at - 1) >> 1
        if queue[parent].time < time or (queue[parent].time == time and queue[parent].number < number):
            break
        queue[at].time = queue[parent].time
        queue[at].number = queue[parent].number
        queue[at].slot = queue[parent].slot
        at = parent
    queue[at].time = time
    queue[at].number = number
    queue[at].slot = slot


@compiled
def _next_begin(queue, totals) -> int:
    """Takes the first of the flows to begin off their heap."""
    slot = queue[0].slot
    length = totals[0].coming - 1
    totals[0].coming = length
    if length == 0:
        return int(slot)
    time, number, last = queue[length].time, queue[length].number, queue[length].slot
    at = 0
    while True:
        child = 2 * at + 1
        if child >= length:
            break
        right = child + 1
        if right < length and (
            queue[right].time < queue[child].time
            or (queue[right].time == queue[child].time and queue[right].number < queue[child].number)
        ):
            child = right
        if queue[child].time > time or (queue[child].time == time and queue[child].number > number):
            break
        queue[at].time = queue[child].time
        queue[at].number = queue[child].number
        queue[at].slot = queue[child].slot
        at = child
    queue[at].time = time
    queue[at].number = number
    queue[at].slot = last
    return int(slot)


@compiled
def _begin_all(links, heaps, flows, path, places, queue, totals, time: float) -> None:
    """All flows that begin at this very time."""
    while totals[0].coming > 0 and queue[0].time == time:
        slot = _next_begin(queue, totals)
        while slot >= 0:
            following = queue[slot].chain
            _begin(links, heaps, flows, path, places, queue, totals, slot)
            slot = following
    totals[0].due = time


@compiled
def advance(links, heaps, flows, path, places, work, queue, totals, until: float, tolerance: float) -> float:
    """Lets happen what is due by a time. Rates are shared anew only when time has to move on.

    tolerance  see `_end`; 0: exact
    Returns    s: when something happens next, inf for never
    """
    while True:
        begins = queue[0].time if totals[0].coming > 0 else np.inf
        ends = heaps[ENDS, heaps[ENDS, 0].entry].rank if totals[0].ending > 0 else np.inf
        time = min(begins, ends)
        if totals[0].doubted + totals[0].marked > 0 and time > totals[0].due:
            share_out(links, heaps, flows, path, places, work, totals)
            continue
        if time > until or time == np.inf:
            return time
        totals[0].now = max(time, totals[0].now)
        if begins <= ends:
            _begin_all(links, heaps, flows, path, places, queue, totals, begins)
        else:
            link = heaps[ENDS, 0].entry
            _end(links, heaps, flows, path, places, queue, totals, link, tolerance)
            if heaps[ENDS, link].rank <= time:
                _look_up_end(links, heaps, flows, totals, link)
