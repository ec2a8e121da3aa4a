"""Flows begin, share links max-min fairly, and end: compiled.

Every link has a level: the most bytes/s per weight that it grants a flow, infinite while it is not
full. A flow's share is the least level of its links; the link that says so is its bottleneck. The
rates are max-min fair just when each link's level is the one that fills it, given what the other
links grant its flows (the advertised rate of Charny, Clark, Jain, ICC 1995).

When flows begin or end, only the levels of their links are in doubt. Links in doubt are judged from
the lowest level upwards, as progressive filling does (Bertsekas, Gallager, Data Networks, 2nd ed.,
section 6.5.2); a link whose level moves puts in doubt the links of the flows that it moved. What
nothing leads to is not looked at. A link knows the sum of what its flows have whose bottleneck lies
elsewhere, so that judging it takes no look at its flows, unless one of those must yield.
"""

from __future__ import annotations

import numpy as np

from clustersim.physics.heaps import announce, lift, next_coming, remove, sink
from clustersim.physics.kernel import DOUBT, ENDS, compiled

#: Shares that differ by less, relatively, are the same: it keeps roundoff from travelling.
SAME = 1e-11

#: A flow is done when less than this share of its bytes is left. Roundoff, no tolerance: what is
#: left of the last of several flows that should end together, as a share of what it had.
DONE = 1e-9

#: After so many changes the sums of a link are taken anew, lest roundoff add up; likewise where
#: less than this share is left of what was added and taken away.
_STALE = 1024
_LITTLE = 1e-3


@compiled
def doubt(heaps, totals, link, level):
    """The level of a link may not be right any more, from this level on upwards."""
    at = heaps[DOUBT, link].place
    if at < 0:
        at = totals[0].doubted
        totals[0].doubted += 1
        heaps[DOUBT, link].rank = level
        heaps[DOUBT, at].entry = link
        lift(heaps, DOUBT, at)
    elif level < heaps[DOUBT, link].rank:
        heaps[DOUBT, link].rank = level
        lift(heaps, DOUBT, at)


@compiled
def note_end(notes, totals, link):
    """The first end on a link has to be looked up anew."""
    if notes[link].in_ends == 0:
        notes[link].in_ends = 1
        notes[totals[0].ends].ends = link
        totals[0].ends += 1


@compiled
def _guess(links, link):
    """The level that fills a link if its own flows stay its own; inf if it has none."""
    if links[link].owned == 0:
        return np.inf
    return max(links[link].capacity - links[link].held, 0.0) / links[link].own


@compiled
def _judge(links, flows, path, places, work, totals, link):
    """The level that fills a link, given what the other links grant its flows; inf: nothing does."""
    totals[0].judged += 1
    if links[link].crossing == 0:
        return np.inf
    own, room = links[link].own, links[link].capacity - links[link].held
    exact = own >= _LITTLE * links[link].peak and room >= _LITTLE * links[link].capacity
    if links[link].fresh == 0 and links[link].stale < _STALE:
        if links[link].owned > 0:
            if exact and room >= links[link].top * own:
                return room / own
        elif links[link].held <= links[link].capacity * (1 + SAME):
            return np.inf
    return _fit(links, flows, path, places, work, totals, link)


@compiled
def _fit(links, flows, path, places, work, totals, link):
    """`_judge`, flow by flow; sums up the link on the way."""
    totals[0].fitted += 1
    width = path.shape[1]
    n, wanted, weights, own, held, top = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    place = np.int64(links[link].head)
    while place >= 0:
        slot = place // width
        weight, bottleneck = flows[slot].weight, np.int64(flows[slot].bottleneck)
        if bottleneck >= 0 and bottleneck != link:
            granted = flows[slot].share
            held += weight * granted
            top = max(top, granted)
        else:
            granted = np.inf
            for hop in range(width):
                other = np.int64(path[slot, hop])
                if other < 0:
                    break
                if other != link:
                    granted = min(granted, links[other].level)
            if bottleneck == link:
                own += weight
        work[n, 0] = granted
        work[n, 1] = weight
        n += 1
        weights += weight
        wanted += weight * granted
        place = np.int64(places[place].after)
    links[link].own, links[link].peak = own, own
    links[link].held, links[link].top, links[link].stale = held, top, 0
    if wanted <= links[link].capacity * (1 + SAME):
        return np.inf
    return _fitting(work[:n], links[link].capacity, weights, links[link].level)


@compiled
def _fitting(work, capacity, weights, level):
    """The level at which flows that are granted no more than work[:, 0] each fill a link.

    Newton's method on a concave function made of straight pieces: from anywhere one step leads
    below the answer, from there on upwards, holding more flows back at each step, or no more.

    work     float64[n, 2]: bytes/s per weight, weight; weights: their sum
    level    where to begin; inf: anywhere
    """
    low = capacity / weights
    if level == np.inf:
        level = low
    below, steps = -1, 0
    while True:
        count, granted, rest = 0, 0.0, 0.0
        for i in range(len(work)):
            if work[i, 0] < level:
                count += 1
                granted += work[i, 0] * work[i, 1]
            else:
                rest += work[i, 1]
        if count == below or (steps > 1 and count < below):
            return level
        if count < len(work) and granted <= capacity:
            level = max(low, (capacity - granted) / rest)
            below = count
        elif steps == 0:
            level, below = low, -1
        else:
            return level
        steps += 1


@compiled
def settle(flows, totals, slot):
    """Counts what a flow has sent so far, before its share changes."""
    now = totals[0].now
    if flows[slot].stamp < now:
        flows[slot].left = max(flows[slot].left - flows[slot].share * (now - flows[slot].stamp), 0.0)
        flows[slot].stamp = now


@compiled
def disown(links, flows, slot, link):
    """A link is no longer the bottleneck of a flow."""
    last, following = np.int64(flows[slot].last), np.int64(flows[slot].next)
    if last >= 0:
        flows[last].next = following
    else:
        links[link].first = following
    if following >= 0:
        flows[following].last = last
    links[link].owned -= 1
    links[link].own = links[link].own - flows[slot].weight if links[link].owned else 0.0


@compiled
def _adopt(links, flows, slot, link):
    first = np.int64(links[link].first)
    flows[slot].last, flows[slot].next = -1, first
    if first >= 0:
        flows[first].last = slot
    links[link].first = slot
    links[link].owned += 1
    links[link].own += flows[slot].weight
    links[link].peak = max(links[link].peak, links[link].own)


@compiled
def _note_move(notes, totals, link):
    if notes[link].in_moved == 0:
        notes[link].in_moved = 1
        notes[totals[0].moved].moved = link
        totals[0].moved += 1


@compiled
def _hold(links, notes, totals, link, more, share):
    """A flow whose bottleneck lies elsewhere has so many bytes/s more of a link."""
    links[link].held += more
    if share > links[link].top:
        links[link].top = share
    _note_move(notes, totals, link)


@compiled
def _narrow(links, notes, flows, path, totals, slot, by):
    """Gives a flow the least level of its links; `by` is the link whose level has just moved."""
    width = path.shape[1]
    least, narrowest = np.inf, np.int64(-1)
    for hop in range(width):
        link = np.int64(path[slot, hop])
        if link < 0:
            break
        if links[link].level < least:
            least, narrowest = links[link].level, link
    before, old = np.int64(flows[slot].bottleneck), flows[slot].share
    if narrowest < 0 or (narrowest == before and abs(least - old) <= SAME * least):
        # Without a narrowest one none of its links is known to be full: one that is in doubt will be.
        return
    settle(flows, totals, slot)
    flows[slot].share = least
    weight = flows[slot].weight
    if before == narrowest:
        more = weight * (least - old)
        for hop in range(width):
            link = np.int64(path[slot, hop])
            if link < 0:
                break
            if link != narrowest:
                _hold(links, notes, totals, link, more, least)
        return
    flows[slot].bottleneck = narrowest
    note_end(notes, totals, narrowest)
    if before >= 0:
        note_end(notes, totals, before)
        disown(links, flows, slot, before)
    _adopt(links, flows, slot, narrowest)
    for hop in range(width):
        link = np.int64(path[slot, hop])
        if link < 0:
            break
        if before < 0:
            links[link].fresh -= 1
        elif link != before:
            links[link].held -= weight * old
        if link != narrowest:
            _hold(links, notes, totals, link, weight * least, least)
        elif link != by:
            _note_move(notes, totals, link)


@compiled
def _grant(links, notes, heaps, flows, path, places, totals, link, level):
    """Gives a link its level, and its flows the least of their links' levels."""
    links[link].level = level
    note_end(notes, totals, link)
    slot = np.int64(links[link].first)
    while slot >= 0:
        following = np.int64(flows[slot].next)
        _narrow(links, notes, flows, path, totals, slot, link)
        slot = following
    if links[link].fresh > 0 or level < links[link].top:
        width = path.shape[1]
        place = np.int64(links[link].head)
        while place >= 0:
            slot = place // width
            if flows[slot].bottleneck == -1 or level < flows[slot].share:
                _narrow(links, notes, flows, path, totals, slot, link)
            place = np.int64(places[place].after)
    for at in range(totals[0].moved):
        other = notes[at].moved
        notes[other].in_moved = 0
        links[other].stale += 1
        if heaps[DOUBT, other].place >= 0:
            continue
        if links[other].level < np.inf or links[other].owned > 0:
            doubt(heaps, totals, other, _guess(links, other))
        elif links[other].held > links[other].capacity:
            doubt(heaps, totals, other, links[other].top)
    totals[0].moved = 0


@compiled
def look_up_end(links, heaps, flows, totals, link):
    """Notes when the first flow ends whose bottleneck a link is."""
    now, level = totals[0].now, links[link].level
    end = np.inf
    if links[link].owned > 0 and level > 0:
        slot = np.int64(links[link].first)
        left = np.inf
        while slot >= 0:
            left = min(left, flows[slot].left - flows[slot].share * (now - flows[slot].stamp))
            slot = np.int64(flows[slot].next)
        end = now + max(left, 0.0) / level
    at = heaps[ENDS, link].place
    heaps[ENDS, link].rank = end
    if end == np.inf:
        if at >= 0:
            remove(heaps, ENDS, at, totals[0].ending)
            totals[0].ending -= 1
        return
    if at < 0:
        at = totals[0].ending
        totals[0].ending += 1
        heaps[ENDS, at].entry = link
        heaps[ENDS, link].place = at
    lift(heaps, ENDS, at)
    sink(heaps, ENDS, heaps[ENDS, link].place, totals[0].ending)


@compiled
def share_out(links, notes, heaps, flows, path, places, work, totals):
    """Judges every link in doubt, from the lowest level upwards. Then the rates are max-min fair."""
    totals[0].shared += 1
    while totals[0].doubted > 0:
        link = heaps[DOUBT, 0].entry
        level = _judge(links, flows, path, places, work, totals, link)
        if level > heaps[DOUBT, link].rank * (1 + SAME) and totals[0].doubted > 1:
            # A link with a lower level may still hold back some of its flows: that one first.
            second = heaps[DOUBT, heaps[DOUBT, 1].entry].rank
            if totals[0].doubted > 2:
                second = min(second, heaps[DOUBT, heaps[DOUBT, 2].entry].rank)
            if level > second:
                heaps[DOUBT, link].rank = level
                sink(heaps, DOUBT, 0, totals[0].doubted)
                continue
        remove(heaps, DOUBT, 0, totals[0].doubted)
        totals[0].doubted -= 1
        old = links[link].level
        differs = level != old and (level == np.inf or old == np.inf or abs(level - old) > SAME * old)
        # Flows that have not been shared out need their share, be it the one that others had before.
        if differs or links[link].fresh > 0:
            _grant(links, notes, heaps, flows, path, places, totals, link, level)
    for at in range(totals[0].ends):
        link = notes[at].ends
        notes[link].in_ends = 0
        look_up_end(links, heaps, flows, totals, link)
    totals[0].ends = 0
    totals[0].due = np.inf


@compiled
def _finish(flows, agenda, gates, following, totals, slot):
    """A flow is done; whoever waited for it alone is released."""
    now = totals[0].now
    agenda[totals[0].done].done = slot
    agenda[totals[0].done].done_at = now
    totals[0].done += 1
    if len(gates) == 0:
        return
    for at in range(gates[slot].first, gates[slot + 1].first):
        other = following[at]
        gates[other].missing -= 1
        if gates[other].missing == 0:
            release = max(now, gates[other].start)
            gates[other].release = release
            flows[other].chain = -1
            announce(flows, agenda, totals, release + gates[other].latency, other)


@compiled
def _begin(links, heaps, flows, path, places, agenda, gates, following, totals, slot):
    """The latency of a flow is over: it takes its place on its links."""
    width = path.shape[1]
    flows[slot].left = flows[slot].load
    flows[slot].stamp = totals[0].now
    flows[slot].share = 0.0
    if path[slot, 0] < 0 or flows[slot].load <= 0:
        _finish(flows, agenda, gates, following, totals, slot)
        return
    flows[slot].bottleneck = -1
    for hop in range(width):
        link = np.int64(path[slot, hop])
        if link < 0:
            break
        place = slot * width + hop
        first = np.int64(links[link].head)
        places[place].before, places[place].after = -1, first
        if first >= 0:
            places[first].before = place
        links[link].head = place
        links[link].crossing += 1
        links[link].fresh += 1
        doubt(heaps, totals, link, 0.0)


@compiled
def leave(links, notes, heaps, flows, path, places, totals, slot):
    """Takes a flow off its links, which may now grant the others more."""
    width = path.shape[1]
    settle(flows, totals, slot)
    bottleneck = np.int64(flows[slot].bottleneck)
    if bottleneck >= 0:
        note_end(notes, totals, bottleneck)
        disown(links, flows, slot, bottleneck)
    for hop in range(width):
        link = np.int64(path[slot, hop])
        if link < 0:
            break
        place = slot * width + hop
        before, after = np.int64(places[place].before), np.int64(places[place].after)
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
            links[link].held, links[link].top = 0.0, 0.0
        if links[link].level < np.inf:
            doubt(heaps, totals, link, links[link].level)
    flows[slot].bottleneck = -2


@compiled
def end_on(links, notes, heaps, flows, path, places, agenda, gates, following, totals, link):
    """Ends the flows that are done by now, among those whose bottleneck a link is.

    They keep their share until rates are shared out anew. That is due before any of them could have
    sent `tolerance` of its bytes once more, so the run is the exact one of flows that have up to
    that much more to send; 0: at once.
    """
    now = totals[0].now
    slot = np.int64(links[link].first)
    while slot >= 0:
        after = np.int64(flows[slot].next)
        share, load = flows[slot].share, flows[slot].load
        left = flows[slot].left - share * (now - flows[slot].stamp)
        if share > 0 and (now + left / share <= now or left < DONE * load):
            totals[0].due = min(totals[0].due, now + totals[0].tolerance * load / share)
            leave(links, notes, heaps, flows, path, places, totals, slot)
            _finish(flows, agenda, gates, following, totals, slot)
        slot = after


@compiled
def set_capacity(links, heaps, totals, link, capacity):
    """A link has another bandwidth from now on."""
    links[link].capacity = capacity
    totals[0].due = totals[0].now
    if links[link].crossing > 0:
        doubt(heaps, totals, link, 0.0)


@compiled
def start(flows, path, agenda, totals, slots, size, weight, links, latency, now):
    """Puts flows into slots; those of one latency, as far as they follow each other, begin together.

    slots  int64[F]; size, weight, links, latency as in network.Flows
    """
    head = -1
    for row in range(len(slots)):
        slot = slots[row]
        flows[slot].weight = weight[row]
        flows[slot].load = size[row] / weight[row]
        flows[slot].left = flows[slot].load
        flows[slot].stamp = now
        flows[slot].share = 0.0
        flows[slot].bottleneck = -2
        flows[slot].chain = -1
        for hop in range(path.shape[1]):
            path[slot, hop] = links[row, hop] if hop < links.shape[1] else -1
        if row > 0 and latency[row] == latency[row - 1]:
            flows[slots[row - 1]].chain = slot
        else:
            if row > 0:
                announce(flows, agenda, totals, now + latency[row - 1], head)
            head = slot
    announce(flows, agenda, totals, now + latency[len(slots) - 1], head)


@compiled
def advance(links, notes, heaps, flows, path, places, work, agenda, gates, following, totals, until):
    """Lets happen what is due by a time. Rates are shared out anew only when time has to move on.

    until    s
    Returns  s when something happens next, inf for never
    """
    while True:
        begins = agenda[0].time if totals[0].coming > 0 else np.inf
        ends = heaps[ENDS, heaps[ENDS, 0].entry].rank if totals[0].ending > 0 else np.inf
        time = min(begins, ends)
        if totals[0].doubted + totals[0].ends == 0:
            totals[0].due = np.inf
        elif time > totals[0].due:
            share_out(links, notes, heaps, flows, path, places, work, totals)
            continue
        if time > until or time == np.inf:
            return time
        totals[0].now = max(time, totals[0].now)
        if begins <= ends:
            while totals[0].coming > 0 and agenda[0].time == begins:
                slot = next_coming(agenda, totals)
                while slot >= 0:
                    chained = np.int64(flows[slot].chain)
                    _begin(links, heaps, flows, path, places, agenda, gates, following, totals, slot)
                    slot = chained
            totals[0].due = totals[0].now
        else:
            link = heaps[ENDS, 0].entry
            end_on(links, notes, heaps, flows, path, places, agenda, gates, following, totals, link)
            if totals[0].due > totals[0].now or heaps[ENDS, link].rank <= time:
                look_up_end(links, heaps, flows, totals, link)


@compiled
def stop(links, notes, heaps, flows, path, places, totals, slots, left):
    """Takes flows that are not done off their links, or keeps them from beginning.

    left  float64[F], set to the bytes that each has not sent
    """
    for row in range(len(slots)):
        slot = slots[row]
        if flows[slot].bottleneck == -2:
            left[row] = flows[slot].load * flows[slot].weight
            # It has nothing to send any more, and is done the moment it begins.
            flows[slot].load = 0.0
        else:
            leave(links, notes, heaps, flows, path, places, totals, slot)
            left[row] = flows[slot].left * flows[slot].weight
    totals[0].due = totals[0].now
