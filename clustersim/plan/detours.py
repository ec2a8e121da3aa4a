"""Ways around dead links: the shortest that are left, ties broken by an ECMP hash.

A detour passes other GPUs only where there is no other way: from a GPU whose card is dead over
NVLink to a neighbour and out by the neighbour's card, as NCCL does it with PXN. A network card
serves the GPUs it is plugged into and forwards nothing from switch to switch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.plan.paths import mix, path_latency
from clustersim.plan.topology import Topology

Ints = NDArray[np.int64]

#: Ways that are remembered; bounds the memory of runs in which many links fail in turn.
_MOST_WAYS = 400_000


@dataclass(frozen=True, eq=False)
class Ways:
    """Detours of F flows.

    links    int32[F, P] link numbers in order of travel, padded with -1 at the end
    latency  float64[F] s, the sum over the way
    found    bool[F] whether there is one; the rows of the others are empty
    """

    links: NDArray[np.int32]
    latency: NDArray[np.float64]
    found: NDArray[np.bool_]


class Detours:
    """The ways around any set of dead links, each worked out once and then remembered.

    A way depends on nothing but the topology, its two ends and the dead links.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._mesh: _Mesh | None = None
        self._held: dict[frozenset[int], dict[tuple[int, int], tuple[int, ...] | None]] = {}

    def around(self, source: NDArray[np.integer], target: NDArray[np.integer], dead: frozenset[int]) -> Ways:
        """The ways that flows can take.

        source, target  int[F] GPU numbers
        dead            link numbers
        """
        pairs = list(zip(source.tolist(), target.tolist(), strict=True))
        if sum(map(len, self._held.values())) > _MOST_WAYS:
            self._held.clear()
        held = self._held.setdefault(dead, {})
        missing = sorted({(t, s) for s, t in pairs if (s, t) not in held})
        if missing:
            self._mesh = self._mesh or _Mesh(self._topology)
            held.update(self._mesh.ways([(s, t) for t, s in missing], dead))
        ways = [held[pair] for pair in pairs]
        links = np.full((len(ways), max((len(w) for w in ways if w), default=0)), -1, dtype=np.int32)
        for row, way in zip(links, ways, strict=True):
            row[: len(way or ())] = way or ()
        return Ways(
            links,
            path_latency(links, self._topology.links.latency),
            np.array([way is not None for way in ways], dtype=bool),
        )


class _Mesh:
    """The topology as numbered places. A card is two of them: one entered from GPUs, which leads
    anywhere, and one entered from the network, which leads to GPUs only.

    gpu    int[R] place of each GPU; is_gpu: bool[V]
    tail, head, link  int64[E] edges between places, sorted by head
    out    per place its edges as (head, link), in the order of link numbers
    """

    def __init__(self, topology: Topology) -> None:
        graph = topology.graph
        kind = dict(graph.nodes(data="kind"))
        number = {name: n for n, name in enumerate(graph)}
        inward = {name: len(number) + n for n, name in enumerate(v for v in graph if kind[v] == "nic")}
        edges: list[tuple[int, int, int]] = []
        for a, b, link in sorted(graph.edges(data="link"), key=lambda edge: edge[2]):
            head = inward[b] if kind[b] == "nic" and kind[a] != "gpu" else number[b]
            edges.append((number[a], head, link))
            if kind[a] == "nic" and kind[b] == "gpu":
                edges.append((inward[a], head, link))
        self._places = len(number) + len(inward)
        self._gpu = [number[name] for name in topology.gpus]
        self._is_gpu = np.zeros(self._places, dtype=bool)
        self._is_gpu[self._gpu] = True
        self._out: list[list[tuple[int, int]]] = [[] for _ in range(self._places)]
        for tail, head, link in edges:
            self._out[tail].append((head, link))
        table = np.array(sorted(edges, key=lambda edge: edge[1]), dtype=np.int64).reshape(-1, 3)
        self._tail, self._head, self._link = table.T

    def ways(
        self, pairs: Sequence[tuple[int, int]], dead: frozenset[int]
    ) -> Iterable[tuple[tuple[int, int], tuple[int, ...] | None]]:
        """Each pair of GPUs with its way, None where none is left. pairs: those of a target in a row."""
        alive = ~np.isin(self._link, sorted(dead))
        tail = self._tail[alive]
        first = np.searchsorted(self._head[alive], np.arange(self._places + 1))
        fields: dict[bool, list[int]] = {}
        last = -1
        for source, target in pairs:
            if target != last:
                fields, last = {}, target
            found = None
            for through_gpus in (False, True):
                if through_gpus not in fields:
                    fields[through_gpus] = self._field(self._gpu[target], tail, first, through_gpus)
                found = self._walk(source, target, fields[through_gpus], dead, through_gpus)
                if found is not None:
                    break
            yield (source, target), found

    def _field(self, target: int, tail: Ints, first: Ints, through_gpus: bool) -> list[int]:
        """Links from every place to the target, -1 where no way leads: breadth first, backwards."""
        field = np.full(self._places, -1, dtype=np.int64)
        front, depth = np.array([target]), 0
        field[target] = 0
        while front.size:
            depth += 1
            count = first[front + 1] - first[front]
            nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            before = tail[np.repeat(first[front], count) + nth]
            before = np.unique(before[field[before] < 0])
            field[before] = depth
            front = before if through_gpus else before[~self._is_gpu[before]]
        found: list[int] = field.tolist()
        return found

    def _walk(
        self, source: int, target: int, field: list[int], dead: frozenset[int], through_gpus: bool
    ) -> tuple[int, ...] | None:
        """One of the shortest ways, chosen link by link by a hash of its ends."""
        here, goal = self._gpu[source], self._gpu[target]
        if field[here] < 0:
            return None
        dice, way = mix(mix(np.array([source], dtype=np.uint64)) + np.uint64(target)), []
        for left in range(field[here] - 1, -1, -1):
            onward = [
                (head, link)
                for head, link in self._out[here]
                if field[head] == left
                and link not in dead
                and (through_gpus or head == goal or not self._is_gpu[head])
            ]
            here, link = onward[int(dice[0]) % len(onward)]
            way.append(link)
            dice = mix(dice)
        return tuple(way)
