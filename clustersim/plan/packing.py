"""Which experts to copy, and how to pack their copies onto ranks: by load, in all layers at once.

The published algorithms are DeepSeek's expert-parallel load balancer (EPLB,
https://github.com/deepseek-ai/EPLB, eplb.py and its README); written anew here. Loads are float32 and
equal ones go in their order, as there, so that the same loads give the same placement.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Where things lie: pack int64[L, I], and which place of its pack each fills, int64[L, I]."""

    pack: np.ndarray
    place: np.ndarray


def balanced_packing(weight: np.ndarray, packs: int) -> Packed:
    """Packs things so that all packs hold equally many and weigh about the same.

    The heaviest first, each into the lightest pack that has room (longest processing time first).
    I steps over P packs, in all layers at once: O(L I P).

    weight   float[L, I]; I is a multiple of `packs`
    Source   EPLB, balanced_packing
    """
    weight = weight.astype(np.float32)
    layers, things = weight.shape
    room = things // packs
    assert room * packs == things, f"{things} things in {packs} packs"
    if room == 1:
        one_each = np.tile(np.arange(things), (layers, 1))
        return Packed(one_each, np.zeros_like(one_each))
    every = np.arange(layers)
    load = np.zeros((layers, packs), dtype=np.float32)
    held = np.zeros((layers, packs), dtype=np.int64)
    pack, place = np.empty((2, layers, things), dtype=np.int64)
    for thing in np.argsort(-weight, axis=1, kind="stable").T:
        lightest = np.where(held < room, load, np.inf).argmin(axis=1)
        pack[every, thing] = lightest
        place[every, thing] = held[every, lightest]
        load[every, lightest] += weight[every, thing]
        held[every, lightest] += 1
    return Packed(pack, place)


def replicated_experts(weight: np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray]:
    """One copy of every expert, then further ones: each of the expert whose copies bear most.

    No other numbers of copies make the heaviest copy lighter. O(L E) per further copy.

    weight   float[L, E]
    places   C >= E
    Returns  int64[L, C] expert of each copy, int64[L, E] copies of each expert
    Source   EPLB, replicate_experts
    """
    weight = weight.astype(np.float32)
    layers, experts = weight.shape
    every = np.arange(layers)
    copies = np.ones((layers, experts), dtype=np.int64)
    expert = np.tile(np.arange(places), (layers, 1))
    for place in range(experts, places):
        heaviest = (weight / copies.astype(np.float32)).argmax(axis=1)
        expert[:, place] = heaviest
        copies[every, heaviest] += 1
    return expert, copies


def balanced(weight: np.ndarray, ranks: int) -> np.ndarray:
    """Every expert once, packed by load.

    weight   float[L, E]
    Returns  int64[L, E] expert in each place, places in the order of ranks
    """
    pack, place = balanced_packing(weight, ranks)
    return _inverse(pack * (weight.shape[1] // ranks) + place)


def eplb(weight: np.ndarray, places: int, groups: int, nodes: int, ranks: int) -> np.ndarray:
    """Groups of experts packed onto nodes, copies made within a node, copies packed onto its ranks.

    Where the groups do not divide by the nodes, groups and nodes count for nothing: copies of any expert
    may stand anywhere (the global policy).

    weight   float[L, E]
    places   C, a multiple of `ranks`; `ranks` is a multiple of `nodes`
    groups   of equally many neighbouring experts
    Returns  int64[L, C] expert in each place; ranks of the first node first
    Source   EPLB, rebalance_experts and rebalance_experts_hierarchical
    """
    if groups % nodes:
        groups = nodes = 1
    layers, experts = weight.shape
    size = experts // groups
    weight = weight.astype(np.float32)
    of_group = weight.reshape(layers, groups, size).sum(axis=2)
    node, place = balanced_packing(of_group, nodes)
    first = (node * (groups // nodes) + place) * size
    # int64[L, E]: the experts in the order of the nodes that they go to
    order = _inverse((first[:, :, None] + np.arange(size)).reshape(layers, experts))
    by_node = np.take_along_axis(weight, order, axis=1).reshape(layers * nodes, experts // nodes)
    expert, copies = replicated_experts(by_node, places // nodes)
    each = np.take_along_axis(by_node / copies.astype(np.float32), expert, axis=1)
    rank, place = balanced_packing(each, ranks // nodes)
    stands = _inverse(rank * (places // ranks) + place)
    within = np.take_along_axis(expert, stands, axis=1).reshape(layers, nodes, -1)
    within += np.arange(nodes)[:, None] * (experts // nodes)
    return np.asarray(np.take_along_axis(order, within.reshape(layers, places), axis=1))


def rank_loads(weight: np.ndarray, copies: np.ndarray, ranks: int) -> np.ndarray:
    """What each rank bears where the copies of an expert share its load evenly.

    weight   float[L, E]
    copies   int[L, C] expert in each place
    Returns  float64[L, EP]
    """
    return np.asarray(each_bears(weight, copies).reshape(len(copies), ranks, -1).sum(axis=2))


def imbalance(weight: np.ndarray, copies: np.ndarray, ranks: int) -> np.ndarray:
    """Load of the busiest rank ÷ the mean, float64[L]; 1 where there is no load. Shapes as above."""
    loads = rank_loads(weight, copies, ranks)
    mean = loads.mean(axis=1)
    return np.asarray(np.divide(loads.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0))


def each_bears(weight: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """float64[L, C]: load of every copy."""
    layers, experts = weight.shape
    cells = copies + np.arange(layers)[:, None] * experts
    times = np.bincount(cells.ravel(), minlength=weight.size).reshape(weight.shape)
    return np.asarray(np.take_along_axis(weight.astype(float) / np.maximum(times, 1), copies, axis=1))


def _inverse(permutation: np.ndarray) -> np.ndarray:
    """Row by row: where does each number stand?"""
    return np.argsort(permutation, axis=1)
