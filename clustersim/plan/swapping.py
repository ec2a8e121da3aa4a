"""Packings made better by swapping copies between ranks: never worse than what they start from."""

from __future__ import annotations

import numpy as np

from clustersim.plan import packing

#: A swap must lower the busiest rank by more than this share of its load: rounding is no gain.
_ROUNDING = 1e-12


def packed(weight: np.ndarray, places: int, ranks: int) -> np.ndarray:
    """EPLB's global placement or the one without copies, improved: the busiest rank swaps while that helps.

    Copies of one expert on one rank are taken apart where that costs nothing. Every other swap takes the
    busiest rank below what it was and lifts none as high, so it ends; C swaps per layer are the most.
    A swap is the best of the busiest rank's C / EP copies with any of the C: O(L C^2 / EP); O(L C^3 / EP)
    for all, though few swaps are made: 61 layers of 256 experts on 64 ranks take some tenths of a second.

    weight   float[L, E]
    Returns  int64[L, C]; no layer's `packing.imbalance` is above that of `packing.eplb`, nor, where the
             ranks divide the experts, above that of `packing.balanced`
    """
    found = _improved(weight, packing.eplb(weight, places, 1, 1, ranks), ranks)
    if places == weight.shape[1] or weight.shape[1] % ranks:
        return found
    # Where all are about as popular, greedy copies leave more than none do.
    other = _improved(weight, _doubled(weight, places, ranks), ranks)
    better = packing.imbalance(weight, other, ranks) < packing.imbalance(weight, found, ranks)
    return np.where(better[:, None], other, found)


def _improved(weight: np.ndarray, start: np.ndarray, ranks: int) -> np.ndarray:
    state = _State(start.copy(), packing.each_bears(weight, start), ranks, weight.shape[1])
    _take_apart(state)
    _level(state, _ROUNDING)
    _take_apart(state)
    better = packing.imbalance(weight, state.copies, ranks) <= packing.imbalance(weight, start, ranks)
    # Sums in another order may differ in the last bit; then the start stands.
    return np.where(better[:, None], state.copies, start)


def _doubled(weight: np.ndarray, places: int, ranks: int) -> np.ndarray:
    """Each expert once, packed by load; in the spare places those of the same rank again, heaviest first.

    That changes no rank's load, but gives the swaps halves to deal with. int64[L, C]
    """
    layers = len(weight)
    once = packing.balanced(weight, ranks).reshape(layers, ranks, -1)
    borne = np.take_along_axis(weight, once.reshape(layers, -1), axis=1).reshape(once.shape)
    heaviest = np.take_along_axis(once, np.argsort(-borne, axis=2, kind="stable"), axis=2)
    again = np.arange(places // ranks - once.shape[2]) % once.shape[2]
    return np.concatenate([once, heaviest[:, :, again]], axis=2).reshape(layers, places)


def levelled(weight: np.ndarray, copies: np.ndarray, ranks: int, least: float) -> np.ndarray:
    """A placement after the busiest rank has swapped copies with others while that helps enough.

    copies   int[L, C]
    least    a swap leaves both its ranks this share below what the busiest bore
    Returns  int64[L, C]
    """
    state = _State(copies.copy(), packing.each_bears(weight, copies), ranks, weight.shape[1])
    _level(state, least)
    return state.copies


class _State:
    """A placement under way: every swap keeps its tables true.

    copies  int64[L, C]
    each    float64[L, C] load of each copy
    held    int64[L, EP, E] copies of each expert on each rank
    load    float64[L, EP]
    """

    def __init__(self, copies: np.ndarray, each: np.ndarray, ranks: int, experts: int) -> None:
        self.copies, self.each, self.ranks = copies, each, ranks
        layers, places = copies.shape
        self.slots = places // ranks
        self.rank = np.arange(places) // self.slots
        cells = (np.arange(layers)[:, None] * ranks + self.rank) * experts + copies
        held = np.bincount(cells.ravel(), minlength=layers * ranks * experts)
        self.held = held.reshape(layers, ranks, experts)
        self.load = each.reshape(layers, ranks, self.slots).sum(axis=2)

    def swap(self, layers: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
        """Swaps place `one` with place `other` in some layers."""
        for table in (self.copies, self.each):
            table[layers, one], table[layers, other] = table[layers, other], table[layers, one]
        more = self.each[layers, one] - self.each[layers, other]
        for place, change in ((one, more), (other, -more)):
            self.load[layers, self.rank[place]] += change
        for place, before in ((one, other), (other, one)):
            self.held[layers, self.rank[place], self.copies[layers, place]] += 1
            self.held[layers, self.rank[place], self.copies[layers, before]] -= 1

    def costs(self, layers: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The higher load of the two ranks after a swap; infinite where one would hold an expert twice.

        layers   int[A]
        places   int[A, S] places of one rank
        Returns  float64[A, S, C]
        """
        at, here = layers[:, None], self.rank[places[:, 0]]
        change = self.each[layers][:, None, :] - self.each[at, places][:, :, None]
        own = self.load[layers, here][:, None, None]
        others = np.repeat(self.load[layers], self.slots, axis=1)[:, None, :]
        cost = np.maximum(own + change, others - change)
        there = self.held[at, :, self.copies[at, places]] > 0
        back = self.held[at, here[:, None], self.copies[layers]] > 0
        cost[np.repeat(there, self.slots, axis=2) | back[:, None, :]] = np.inf
        return np.asarray(cost)


def _take_apart(state: _State) -> None:
    """Swaps copies that share their rank with another of their expert, where that raises no maximum."""
    layers = np.arange(len(state.copies))
    peak = state.load.max(axis=1)
    for place in range(state.copies.shape[1]):
        twice = state.held[layers, state.rank[place], state.copies[:, place]] > 1
        some = layers[twice]
        if not len(some):
            continue
        cost = state.costs(some, np.full((len(some), 1), place))[:, 0]
        other = cost.argmin(axis=1)
        fine = cost[np.arange(len(some)), other] <= peak[some]
        state.swap(some[fine], np.full(int(fine.sum()), place), other[fine])


def _level(state: _State, least: float) -> None:
    """Swaps between the busiest rank and others until none of its swaps helps it by this share."""
    active = np.arange(len(state.copies))
    for _ in range(state.copies.shape[1]):
        busiest = state.load[active].argmax(axis=1)
        peak = state.load[active, busiest]
        places = busiest[:, None] * state.slots + np.arange(state.slots)
        cost = state.costs(active, places).reshape(len(active), -1)
        best = cost.argmin(axis=1)
        helps = cost[np.arange(len(active)), best] < peak * (1 - least)
        active, best = active[helps], best[helps]
        if not len(active):
            return
        slot, other = np.divmod(best, state.copies.shape[1])
        state.swap(active, places[helps, slot], other)
