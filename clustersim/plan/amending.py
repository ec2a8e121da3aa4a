"""A placement that follows the load by few changes, where a policy would place everything anew.

What the published balancers plan knows nothing of what stands where; most of it has to move. Here copies
are handed from experts that need them least to those that need them most, and then places are swapped with
the busiest rank, the swap that helps most first, as long as each is worth its two moves.
"""

from __future__ import annotations

import numpy as np

from clustersim.plan import packing, swapping

#: A change that leaves its ranks, or its experts' copies, less than this share below what was is not worth
#: moving weights. A guess: of the order of the noise of a few thousand tokens.
_WORTH = 0.02


def amended(weight: np.ndarray, copies: np.ndarray, ranks: int) -> np.ndarray:
    """The present places, with the few changes that balance most.

    weight   float[L, E] tokens per expert
    copies   int[L, C] expert in each place now
    Returns  int64[L, C]; every expert keeps a place, and no layer's imbalance is above what it was
    """
    places = copies.astype(np.int64)
    if places.shape[1] > weight.shape[1]:
        places = np.stack([_recopied(*one, ranks) for one in zip(weight, places, strict=True)])
    found = swapping.levelled(weight, places, ranks, _WORTH)
    better = packing.imbalance(weight, found, ranks) < packing.imbalance(weight, copies, ranks)
    return np.where(better[:, None], found, copies)


def _recopied(weight: np.ndarray, copies: np.ndarray, ranks: int) -> np.ndarray:
    """One layer's places after copies went from experts that lack them least to those that bear most.

    The copy that goes is the one on the busiest rank where the heavier expert does not stand yet. Copies
    beyond an expert's first are C - E; no more changes are made.
    """
    copies = copies.copy()
    times = np.bincount(copies, minlength=len(weight))
    rank = np.arange(len(copies)) // (len(copies) // ranks)
    for _ in range(len(copies) - len(weight)):
        each = weight / times
        heavy = int(each.argmax())
        without = np.where(times > 1, weight / np.maximum(times - 1, 1), np.inf)
        light = int(without.argmin())
        if without[light] >= (1 - _WORTH) * each[heavy]:
            break
        load = np.bincount(rank, weights=each[copies], minlength=ranks)
        load[rank[copies == heavy]] = -np.inf
        givers = np.flatnonzero(copies == light)
        place = givers[load[rank[givers]].argmax()]
        if load[rank[place]] == -np.inf:
            break
        copies[place] = heavy
        times[light] -= 1
        times[heavy] += 1
    return copies
