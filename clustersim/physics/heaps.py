"""The heaps of the fluid model, compiled: links by level or by first end, and flows by when they begin."""

from __future__ import annotations

from clustersim.physics.kernel import compiled


@compiled
def _less(heaps, which, a, b):
    first, second = heaps[which, a].rank, heaps[which, b].rank
    return first < second or (first == second and a < b)


@compiled
def lift(heaps, which, at):
    """Moves an entry up to where it belongs."""
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
def sink(heaps, which, at, length):
    """Moves an entry of a heap of so many down to where it belongs."""
    link = heaps[which, at].entry
    while True:
        child = 2 * at + 1
        if child >= length:
            break
        other = heaps[which, child].entry
        if child + 1 < length and _less(heaps, which, heaps[which, child + 1].entry, other):
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
def remove(heaps, which, at, length):
    """Takes an entry out of a heap of so many."""
    heaps[which, heaps[which, at].entry].place = -1
    last = length - 1
    if at < last:
        link = heaps[which, last].entry
        heaps[which, at].entry = link
        heaps[which, link].place = at
        sink(heaps, which, at, last)
        lift(heaps, which, heaps[which, link].place)


@compiled
def announce(flows, agenda, totals, time, slot):
    """A flow, and those chained to it, will begin at a time."""
    at = totals[0].coming
    totals[0].coming += 1
    number = totals[0].number
    totals[0].number += 1
    while at > 0:
        parent = (at - 1) >> 1
        if agenda[parent].time <= time:
            break
        agenda[at].time = agenda[parent].time
        agenda[at].number = agenda[parent].number
        agenda[at].slot = agenda[parent].slot
        at = parent
    agenda[at].time, agenda[at].number, agenda[at].slot = time, number, slot


@compiled
def _sooner(agenda, a, time, number):
    return agenda[a].time < time or (agenda[a].time == time and agenda[a].number < number)


@compiled
def next_coming(agenda, totals):
    """Takes the first of the flows that will begin off their heap."""
    slot = agenda[0].slot
    length = totals[0].coming - 1
    totals[0].coming = length
    time, number, last = agenda[length].time, agenda[length].number, agenda[length].slot
    at = 0
    while True:
        child = 2 * at + 1
        if child >= length:
            break
        right = child + 1
        if right < length and _sooner(agenda, right, agenda[child].time, agenda[child].number):
            child = right
        if not _sooner(agenda, child, time, number):
            break
        agenda[at].time = agenda[child].time
        agenda[at].number = agenda[child].number
        agenda[at].slot = agenda[child].slot
        at = child
    agenda[at].time, agenda[at].number, agenda[at].slot = time, number, last
    return slot
