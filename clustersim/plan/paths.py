"""Which links a flow crosses: the rail rule first, then the shortest way, ties broken by an ECMP hash.

A path is put together from two legs, the first only where the rail rule sends a flow to a
neighbour that sits on the target's rail. A leg leaves its GPU by a *door* (its way to the first
switch), crosses the *core* (what remains of the graph without GPUs) switch by switch, and
enters by a door of the target. A card that serves one GPU and hangs on one switch is not a
vertex of the core but a bend in a door: so the core of a thousand GPUs has only a few dozen vertices.

Nothing here knows of spraying or of several cards per GPU: what shares traffic evenly is one link
already (`plan/families.py`). Between groups of routers a flow may be sent through a third group
(Valiant routing), which is one more stop on its way through the core.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from clustersim.plan.topology import Topology

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

#: Longer than any path, and small enough that a few of them add up within int64.
_FAR = 1 << 40

#: Sets the choice of a third group apart from the choices made on the way.
_SALT = np.uint64(0xD1B54A32D192ED03)

#: A set of flows (by row) and the one link that each crosses next.
_Step = tuple[Ints, Ints]


@dataclass(frozen=True, eq=False)
class PathTable:
    """The paths of F flows.

    links    int32[F, P] link numbers in order of travel, padded with -1 at the end; P is the longest
    latency  float64[F] s, the sum over the path
    """

    links: NDArray[np.int32]
    latency: NDArray[np.float64]


def path_latency(links: NDArray[np.integer], latency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds from end to end of paths, float64[F].

    links    int[F, P] link numbers, padded with -1
    latency  float64[K] s of every link
    """
    padded = np.append(latency, 0.0)
    total = np.zeros(len(links))
    # Link by link: numpy's own sum over rows rounds differently when the padding is wider.
    for column in links.T:
        total += padded[column]
    return total


class Paths:
    """The paths between the GPUs of a topology; each is worked out once and then remembered.

    A path depends on nothing but the topology and its two ends, whatever was asked before or beside it.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._first = _first_gpu(topology.server)
        self._fabric = _Fabric(topology)
        # Ascending keys; the last one is beyond all pairs, so that a search always lands on a row.
        self._keys: Ints = np.array([np.iinfo(np.int64).max])
        self._links = np.empty((1, 0), dtype=np.int32)
        self._latency = np.zeros(1)

    def between(self, source: NDArray[np.integer], target: NDArray[np.integer]) -> PathTable:
        """The links that flows cross.

        source, target  int[F] GPU numbers; a flow from a GPU to itself has an empty path
        """
        keys = self._pair_keys(source, target)
        missing = np.unique(keys[self._keys[np.searchsorted(self._keys, keys)] != keys])
        if missing.size:
            self._remember(missing)
        row = np.searchsorted(self._keys, keys)
        links = self._links[row]
        longest = int((links >= 0).sum(axis=1).max(initial=0))
        return PathTable(links[:, :longest], self._latency[row])

    def _pair_keys(self, source: NDArray[np.integer], target: NDArray[np.integer]) -> Ints:
        gpus = len(self._topology.gpus)
        for ends in (source, target):
            assert ends.size == 0 or (ends.min() >= 0 and ends.max() < gpus), "no such GPU"
        return np.asarray(source, dtype=np.int64) * gpus + target

    def _remember(self, keys: Ints) -> None:
        source, target = np.divmod(keys, len(self._topology.gpus))
        links = _table(keys.size, list(self._steps(source, target)))
        width = max(links.shape[1], self._links.shape[1])
        self._keys = np.concatenate([self._keys, keys])
        order = np.argsort(self._keys)
        self._keys = self._keys[order]
        self._links = np.concatenate([_widened(self._links, width), _widened(links, width)])[order]
        self._latency = np.concatenate([self._latency, path_latency(links, self._topology.links.latency)])[
            order
        ]

    def _steps(self, source: Ints, target: Ints) -> Iterator[_Step]:
        rows = np.arange(source.size)
        dice = mix(mix(source.astype(np.uint64)) + target.astype(np.uint64))
        via = self._relay(source, target)
        yield from self._fabric.leg(rows, source, via, dice)
        yield from self._fabric.leg(rows, via, target, mix(dice))

    def _relay(self, source: Ints, target: Ints) -> Ints:
        """The GPU at which a flow leaves its server: another than the source only by the rail rule (PXN).

        Where GPUs share a card it is the one in the target's place, so that the sharers take turns.
        """
        t = self._topology
        crossing = (t.domain[source] != t.domain[target]) & (t.rail[source] != t.rail[target])
        neighbour = self._first[source] + target - self._first[target]
        return np.where(crossing, neighbour, source)


class _Fabric:
    """Legs between GPUs that pass no other GPU, unless there is no other way."""

    def __init__(self, topology: Topology) -> None:
        graph = topology.graph
        self._topology = topology
        kind = dict(graph.nodes(data="kind"))
        bends = {name for name in graph if kind[name] == "nic" and _is_bend(graph, kind, name)}
        core = [name for name in graph if kind[name] != "gpu" and name not in bends]
        number = {name: n for n, name in enumerate(core)}
        self._core = _Mesh(graph, number)
        self._group: Ints = np.array([graph.nodes[name]["group"] for name in core], dtype=np.int64)
        self._exits = _doors(graph, topology.gpus, number)
        self._entries = _doors(graph.reverse(copy=False), topology.gpus, number)
        gpu = {name: n for n, name in enumerate(topology.gpus)}
        self._cabled: Ints = np.array(
            [gpu[a] * len(gpu) + gpu[b] for a in gpu for b in graph.successors(a) if b in gpu], dtype=np.int64
        )

    def leg(self, rows: Ints, source: Ints, target: Ints, dice: Hashes) -> Iterator[_Step]:
        """The links of one leg, one step after the other.

        rows            int[F] by which the flows are known in the steps
        source, target  int[F] GPU numbers
        dice            uint64[F] hash of each flow
        """
        away = source != target
        rows, source, target, dice = rows[away], source[away], target[away], dice[away]
        if not rows.size:
            return
        out, into, found = self._choose_doors(source, target, dice)
        found &= ~np.isin(source * len(self._topology.gpus) + target, self._cabled)
        yield from self._by_switches(rows[found], out[found], into[found], dice[found])
        if not found.all():
            lost = ~found
            yield from self._by_gpus(rows[lost], source[lost], target[lost], dice[lost])

    def _choose_doors(self, source: Ints, target: Ints, dice: Hashes) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """The pair of doors with the fewest links between the GPUs; NVLink before cards, then by hash.

        Returns  int[F] doors of exit, int[F] doors of entry, bool[F] whether there is a way at all
        """
        out, into = self._exits.of(source)[:, :, None], self._entries.of(target)[:, None, :]
        links = self._exits.length[out] + self._entries.length[into]
        links = links + self._core.distance(self._exits.vertex[out], self._entries.vertex[into])
        # Two GPUs that share a card are as near through it as through their NVSwitch.
        cost = (4 * links + self._exits.by_card[out] + self._entries.by_card[into]).reshape(len(source), -1)
        best = cost.min(axis=1)
        tied = cost == best[:, None]
        turn = _pick(dice, tied.sum(axis=1))
        choice = (tied.cumsum(axis=1) > turn[:, None]).argmax(axis=1)
        exit_, entry = np.divmod(choice, into.shape[2])
        flow = np.arange(len(source))
        return out[flow, exit_, 0], into[flow, 0, entry], best < _FAR

    def _by_switches(self, rows: Ints, out: Ints, into: Ints, dice: Hashes) -> Iterator[_Step]:
        yield from _bent(rows, self._exits.near[out], self._exits.far[out])
        at, to = self._exits.vertex[out], self._entries.vertex[into]
        if self._topology.routing == "valiant":
            stop = self._stop(at, to, mix(dice ^ _SALT))
            yield from self._core.walk(rows, at, stop, mix(dice))
            at = stop
        yield from self._core.walk(rows, at, to, dice)
        yield from _bent(rows, self._entries.far[into], self._entries.near[into])

    def _stop(self, at: Ints, to: Ints, dice: Hashes) -> Ints:
        """The router of a third group that a flow passes; where it starts, if its ends share a group.

        It is one of those nearest to the start, so that the way there meets no other of its group.

        Source  Kim, Dally, Scott, Abts: Technology-driven, highly-scalable dragonfly topology, ISCA 2008.
        """
        groups, here, there = int(self._group.max(initial=0)) + 1, self._group[at], self._group[to]
        stop = at.copy()
        rows = np.flatnonzero((here != there) & (here >= 0) & (there >= 0))
        if groups < 3 or not rows.size:
            return stop
        low, high = np.minimum(here, there)[rows], np.maximum(here, there)[rows]
        third = _pick(dice[rows], np.full(rows.size, groups - 2))
        third += third >= low
        third += third >= high
        pairs, flow = np.unique(at[rows] * groups + third, return_inverse=True)
        for pair, (start, group) in enumerate(zip(*np.divmod(pairs, groups), strict=True)):
            inside = np.flatnonzero(self._group == group)
            far = self._core.distance(np.full(inside.size, start), inside)
            near = inside[far == far.min()]
            mine = rows[flow == pair]
            stop[mine] = near[_pick(mix(dice[mine]), np.full(mine.size, near.size))]
        return stop

    def _by_gpus(self, rows: Ints, source: Ints, target: Ints, dice: Hashes) -> Iterator[_Step]:
        """Over GPU-to-GPU cables, or through GPUs that pass on: only machines given vertex by vertex."""
        at, to = self._gpu_vertex[source], self._gpu_vertex[target]
        yield from self._whole.walk(rows, at, to, dice)

    @cached_property
    def _whole(self) -> _Mesh:
        return _Mesh(self._topology.graph, {name: n for n, name in enumerate(self._topology.graph)})

    @cached_property
    def _gpu_vertex(self) -> Ints:
        number = {name: n for n, name in enumerate(self._topology.graph)}
        return np.array([number[name] for name in self._topology.gpus])


class _Mesh:
    """Shortest ways through a part of the graph; distances are kept per target.

    graph   the machine
    number  0, 1 … of the vertices that belong to the part, by name
    """

    def __init__(self, graph: nx.DiGraph, number: Mapping[str, int]) -> None:
        inside = [
            (number[a], edge["link"], number[b], edge["weight"])
            for a, b, edge in graph.edges(data=True)
            if a in number and b in number
        ]
        edges = np.array(sorted(inside), dtype=np.int64).reshape(-1, 4)
        self._tail, self._link, self._head, self._weight = edges.T
        self._weights = np.unique(self._weight).tolist()
        self._size = max(1, len(number))  # the walls of `_Doors` point at vertex 0
        self._backwards = np.argsort(self._head, kind="stable")
        self._out = _Slices(self._tail, self._size)
        self._into = _Slices(self._head[self._backwards], self._size)
        self._row: Ints = np.full(self._size, -1)
        self._fields = np.empty((0, self._size), dtype=np.int32)

    def distance(self, at: Ints, to: Ints) -> Ints:
        """Links on the shortest way, each counted by its weight; beyond `_FAR` where there is none.

        at, to   vertex numbers of any shapes that broadcast
        Returns  int[...] of the shape they have together
        """
        self._explore(to)
        links: Ints = self._fields[self._row[to], at].astype(np.int64)
        links[links < 0] = _FAR
        return links

    def walk(self, rows: Ints, at: Ints, to: Ints, dice: Hashes) -> Iterator[_Step]:
        """Link by link to `to`; which of several shortest ways is decided anew at every vertex."""
        while (moving := at != to).any():
            rows, at, to, dice = rows[moving], at[moving], to[moving], mix(dice[moving])
            edge = self._next_edge(at, to, dice)
            yield rows, self._link[edge]
            at = self._head[edge]

    def _next_edge(self, at: Ints, to: Ints, dice: Hashes) -> Ints:
        # Far fewer pairs of vertices than flows: a thousand flows ask a leaf the same question.
        pairs, flow = np.unique(at * self._size + to, return_inverse=True)
        here, there = np.divmod(pairs, self._size)
        pair, edge = self._out.members(here)
        beyond = self.distance(self._head[edge], there[pair]) + self._weight[edge]
        nearer = beyond == self.distance(here, there)[pair]
        pair, edge = pair[nearer], edge[nearer]
        ways = np.bincount(pair, minlength=pairs.size)
        first = np.cumsum(ways) - ways
        chosen: Ints = edge[first[flow] + _pick(dice, ways[flow])]
        return chosen

    def _explore(self, to: Ints) -> None:
        wanted = np.zeros(self._size, dtype=np.bool_)
        wanted[to] = True
        missing = np.flatnonzero(wanted & (self._row < 0))
        if missing.size:
            self._row[missing] = len(self._fields) + np.arange(missing.size)
            self._fields = np.concatenate([self._fields, *(self._field(int(t))[None] for t in missing)])

    def _field(self, target: int) -> NDArray[np.int32]:
        """Links from every vertex to the target, -1 where no way leads: nearest first, backwards."""
        links = np.full(self._size, -1, dtype=np.int32)
        due = {0: [np.array([target])]}  # by distance, the vertices that lie no further away
        while due:
            depth = min(due)
            front = np.unique(np.concatenate(due.pop(depth)))
            front = front[links[front] < 0]
            links[front] = depth
            _, into = self._into.members(front)
            edge = self._backwards[into]
            edge = edge[links[self._tail[edge]] < 0]
            for weight in self._weights:
                before = self._tail[edge[self._weight[edge] == weight]]
                if before.size:
                    due.setdefault(depth + weight, []).append(before)
        return links


class _Slices:
    """Where the equal keys of an ascending list lie.

    keys  int[N] ascending, of 0 … size - 1
    """

    def __init__(self, keys: Ints, size: int) -> None:
        self._count = np.bincount(keys, minlength=size)
        self._start = np.cumsum(self._count) - self._count

    def members(self, wanted: Ints) -> tuple[Ints, Ints]:
        """Positions in the list that hold the wanted keys: (index into `wanted`, position) side by side."""
        count = self._count[wanted]
        asker = np.repeat(np.arange(wanted.size), count)
        nth = np.arange(asker.size) - np.repeat(np.cumsum(count) - count, count)
        return asker, self._start[wanted][asker] + nth


@dataclass(frozen=True, eq=False)
class _Doors:
    """Ways between GPUs and the core, as arrays over all doors; door 0 is a wall that fills the table up.

    table    int[R, D] doors of each GPU
    vertex   the core vertex it leads to
    near     link at the GPU; far: link at the vertex, -1 where there is but one
    length   links, 1 or 2; beyond `_FAR` for the wall
    by_card  whether it leads elsewhere than to an NVSwitch
    """

    table: Ints
    vertex: Ints
    near: Ints
    far: Ints
    length: Ints
    by_card: NDArray[np.bool_]

    def of(self, gpus: Ints) -> Ints:
        return self.table[gpus]


def _doors(graph: nx.DiGraph, gpus: Sequence[str], number: Mapping[str, int]) -> _Doors:
    """The doors by which GPUs are left; of the reversed graph: by which they are entered.

    number  of the core vertices, by name
    """
    doors = [(0, -1, -1, _FAR, True)]
    table: list[list[int]] = []
    for gpu in gpus:
        found = list(_ways_out(graph, gpu, number))
        table.append(list(range(len(doors), len(doors) + len(found))))
        doors += found
    width = max(1, *map(len, table))
    vertex, near, far, length, by_card = zip(*doors, strict=True)
    return _Doors(
        table=np.array([row + [0] * (width - len(row)) for row in table], dtype=np.int64),
        vertex=np.array(vertex, dtype=np.int64),
        near=np.array(near, dtype=np.int64),
        far=np.array(far, dtype=np.int64),
        length=np.array(length, dtype=np.int64),
        by_card=np.array(by_card, dtype=np.bool_),
    )


def _ways_out(
    graph: nx.DiGraph, gpu: str, number: Mapping[str, int]
) -> Iterator[tuple[int, int, int, int, bool]]:
    for first, edge in graph[gpu].items():
        if first in number:
            yield number[first], edge["link"], -1, 1, graph.nodes[first]["kind"] != "nvswitch"
            continue
        for second, beyond in graph[first].items():
            # Any other vertex outside of the core is a GPU, and GPUs lead nowhere.
            if second in number and graph.nodes[first]["kind"] == "nic":
                yield number[second], edge["link"], beyond["link"], 2, True


def _is_bend(graph: nx.DiGraph, kind: Mapping[str, str], card: str) -> bool:
    """Whether a card merely lies between one GPU and one switch, both ways."""
    ends = list(graph.successors(card))
    if len(ends) != 2 or set(ends) != set(graph.predecessors(card)):
        return False
    kinds = [kind[end] for end in ends]
    return kinds.count("gpu") == 1 and "nic" not in kinds


def _bent(rows: Ints, first: Ints, second: Ints) -> Iterator[_Step]:
    """A door's links in order of travel, leaving out the -1 of doors with only one."""
    for links in (first, second):
        there = links >= 0
        yield rows[there], links[there]


def _table(flows: int, steps: Sequence[_Step]) -> NDArray[np.int32]:
    """The steps of all flows, side by side: int32[F, P]."""
    length = np.zeros(flows, dtype=np.int64)
    for rows, _ in steps:
        length[rows] += 1
    table = np.full((flows, length.max(initial=0)), -1, dtype=np.int32)
    length[:] = 0
    for rows, links in steps:
        table[rows, length[rows]] = links
        length[rows] += 1
    return table


def _widened(links: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    return np.pad(links, ((0, 0), (0, width - links.shape[1])), constant_values=-1)


def _first_gpu(server: NDArray[np.int32]) -> Ints:
    """int[R]: the lowest-numbered GPU of each GPU's server."""
    _, first, which = np.unique(server, return_index=True, return_inverse=True)
    return np.asarray(first[which], dtype=np.int64)


def _pick(dice: Hashes, ways: Ints) -> Ints:
    """One of `ways` possibilities, as evenly as the hash is mixed."""
    return (dice % ways.astype(np.uint64)).astype(np.int64)


def mix(value: Hashes) -> Hashes:
    """A 64-bit hash of each value: one step of SplitMix64.

    Source  Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
