"""The deployment as a graph: what is drawn for a StepGraph, node by node and edge by edge.

A StepGraph is one list of operators per stage; each waits for the one before it. A drawing says more: which
tensor each operator takes, from whom, and, where it is wished, which head or expert copy does what. All of it
follows from the operators' own columns. `drawn` yields nodes and edges in an order in which every edge
comes after both of its ends, so that a graph of any size can be written while only its front is held.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

COMMUNICATION, COMPUTATION, ROUTING = "communication", "computation", "routing"
#: Input and output, and what stands for parts that are left out.
END, REST = "end", "rest"

LAYER, EXPERT = "layer", "expert"

#: Heads and expert copies that are drawn where not all are: as the documents of the examples choose them.
_FIRST_HEADS, _MOST_HEADS = 8, 17
_FIRST_COPIES, _MOST_COPIES = 4, 16


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension of a tensor.

    least, most  on one GPU
    whole        of all GPUs together, what several hold alike counted once
    """

    name: str
    least: float
    most: float
    whole: float


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """What an operator takes or gives, as it lies on GPUs.

    name     what flows there: stream, x, query, ...
    ranks    int[n] GPUs that hold some of it
    numbers  float64[n] how much of it on each
    dims     its dimensions, for people; their product is `numbers` where it can be
    key      which head or expert copy it belongs to; None: it is whole
    selects  it says who goes where, and is not itself worked on
    """

    name: str
    ranks: np.ndarray
    numbers: np.ndarray
    dims: tuple[Dim, ...]
    key: Hashable = None
    selects: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One box of the drawing.

    id        unique, such as s0.l3.attention.h5
    title     for people
    kind      communication, computation, routing, end or rest
    operator  index in the StepGraph; -1 where no kernel runs: input, output, views of memory
    name      of the operator, or what it is otherwise
    block     the part of its layer: attention, experts, network; "" outside of layers
    ranks     int[n] its GPUs
    flop      of it, all GPUs together
    sent      bytes that it exchanges, with those that stay at home
    members   heads or expert copies that it stands for, where it is a part of its operator
    experts   logical experts of these copies
    note      one more line for people
    """

    id: str
    title: str
    kind: str
    operator: int
    name: str
    stage: int
    layer: int
    block: str
    ranks: np.ndarray
    takes: tuple[Tensor, ...] = ()
    gives: tuple[Tensor, ...] = ()
    flop: float = 0.0
    sent: float = 0.0
    members: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """What one node hands to another.

    source, target  ids
    given, taken    the tensor as the source leaves it and as the target takes it
    """

    source: str
    target: str
    given: Tensor
    taken: Tensor

    @property
    def selection(self) -> bool:
        """Whether it is there because a gate has chosen."""
        return self.taken.selects


Part = Node | Edge


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be drawn.

    level   layer: operators; expert: heads and expert copies one by one
    full    every shard, head and copy; otherwise shards together, and some of the heads and copies
    layers  only these, the others as one box each run; None: all
    """

    level: str = EXPERT
    full: bool = False
    layers: frozenset[int] | None = None

    def shows(self, layer: int) -> bool:
        """Whether a layer is drawn; what stands outside of layers always is."""
        return layer < 0 or self.layers is None or layer in self.layers

    def heads(self, number: int) -> list[tuple[int, ...]]:
        """Heads by node; several where they are drawn as one."""
        first = range(_FIRST_HEADS)
        last = range(number - _FIRST_HEADS, number)
        return self._parted(number, [*first, *last], _MOST_HEADS)

    def copies(self, number: int) -> list[tuple[int, ...]]:
        """Expert copies by node; several where they are drawn as one."""
        middle = [number // 2 - 1, number // 2]
        last = range(number - _FIRST_COPIES, number)
        return self._parted(number, [*range(_FIRST_COPIES), *middle, *last], _MOST_COPIES)

    def _parted(self, number: int, chosen: Sequence[int], most: int) -> list[tuple[int, ...]]:
        if self.level == LAYER:
            return [tuple(range(number))]
        if self.full or number <= most:
            return [(one,) for one in range(number)]
        rest = tuple(sorted(set(range(number)) - set(chosen)))
        return [
            *((one,) for one in sorted(chosen) if one < rest[0]),
            rest,
            *((one,) for one in sorted(chosen) if one > rest[0]),
        ]


@dataclass(slots=True)
class Registers:
    """Who holds which tensor now, by GPU: the front of the graph while it is being drawn."""

    _held: dict[str, dict[int, list[tuple[Node, Tensor]]]] = field(default_factory=dict)

    def holders(self, taken: Tensor) -> list[tuple[Node, Tensor]]:
        """Nodes that gave what is taken, each once, in the order of its GPUs."""
        by_rank = self._held.get(taken.name, {})
        found: dict[tuple[str, int], tuple[Node, Tensor]] = {}
        for rank in taken.ranks.tolist():
            for node, given in by_rank.get(rank, ()):
                if taken.key is None or given.key is None or given.key == taken.key:
                    found[node.id, id(given)] = (node, given)
        return list(found.values())

    def put(self, node: Node) -> None:
        """What a node gives takes the place of what was there; parts of one operator stand side by side."""
        for given in node.gives:
            by_rank = self._held.setdefault(given.name, {})
            for rank in given.ranks.tolist():
                before = by_rank.get(rank, ())
                kept = [
                    (other, tensor)
                    for other, tensor in before
                    if given.key is not None
                    and tensor.key is not None
                    and (other.name, other.layer) == (node.name, node.layer)
                ]
                by_rank[rank] = [*kept, (node, given)]

    def numbers(self, name: str, ranks: np.ndarray) -> np.ndarray:
        """float64[n] how much of a tensor each of these GPUs holds."""
        by_rank = self._held.get(name, {})
        found = np.zeros(len(ranks))
        for at, rank in enumerate(ranks.tolist()):
            for _, given in by_rank.get(rank, ()):
                found[at] += given.numbers[int(np.searchsorted(given.ranks, rank))]
        return found

    def has(self, name: str, ranks: np.ndarray) -> bool:
        """Whether these GPUs hold such a tensor."""
        return int(ranks[0]) in self._held.get(name, {})

    def forget(self, ranks: np.ndarray) -> None:
        """These GPUs have done their part."""
        for by_rank in self._held.values():
            for rank in ranks.tolist():
                by_rank.pop(rank, None)


def joined(node: Node, registers: Registers) -> Iterator[Part]:
    """The node, then the edges that lead to it; afterwards it holds what it gives."""
    yield node
    for taken in node.takes:
        for source, given in registers.holders(taken):
            yield Edge(source.id, node.id, given, taken)
    registers.put(node)
