"""Coarser drawings: the operators of a block, or of a stage, as one node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from clustersim.plan.dag import COMPUTATION, END, REST, Edge, Node, Part, Tensor
from clustersim.plan.stepgraph import StepGraph

MODEL, STAGE = "model", "stage"


def coarser(parts: Iterable[Part], graph: StepGraph, level: str) -> Iterator[Part]:
    """Operators of a block (level stage) or of a stage (level model) as one node."""
    groups: dict[str, list[Node]] = {}
    place: dict[str, str] = {}
    edges: dict[tuple[str, str, str], Edge] = {}
    for part in parts:
        if isinstance(part, Node):
            place[part.id] = _group(part, level)
            groups.setdefault(place[part.id], []).append(part)
            continue
        ends = place[part.source], place[part.target]
        if ends[0] != ends[1]:
            edges.setdefault((*ends, part.taken.name), Edge(*ends, part.given, part.taken))
    into: dict[str, list[Edge]] = {name: [] for name in groups}
    out: dict[str, list[Edge]] = {name: [] for name in groups}
    for edge in edges.values():
        into[edge.target].append(edge)
        out[edge.source].append(edge)
    for name, nodes in groups.items():
        yield _together(name, nodes, into[name], out[name], graph, level)
        yield from into[name]


def _group(node: Node, level: str) -> str:
    if node.kind in (END, REST) or node.name == "stage_transfer":
        return node.id
    if level == MODEL:
        return f"s{node.stage}"
    if node.layer >= 0:
        return f"s{node.stage}.l{node.layer}.{node.block}"
    head = ("final_norm", "last_tokens", "lm_head", "sampling")
    return f"s{node.stage}.head" if node.name in head else node.id


def _together(
    name: str, nodes: Sequence[Node], into: Sequence[Edge], out: Sequence[Edge], graph: StepGraph, level: str
) -> Node:
    first = nodes[0]
    if len(nodes) == 1:
        return first
    kinds = Counter(
        exchange.kind.replace("_", "-")
        for node in nodes
        if node.operator >= 0 and (exchange := graph.operators[node.operator].exchange) is not None
    )
    exchanges = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())) or "no exchange"
    return Node(
        name, _title(nodes, level), COMPUTATION,
        -1, name.rpartition(".")[2], first.stage, first.layer if level == STAGE else -1, "",
        np.unique(np.concatenate([n.ranks for n in nodes])),
        _once(edge.taken for edge in into), _once(edge.given for edge in out),
        sum(n.flop for n in nodes), sum(n.sent for n in nodes),
        note=f"{sum(n.operator >= 0 for n in nodes)} operators, {exchanges}",
    )  # fmt: skip


def _once(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The first of each name."""
    found: dict[str, Tensor] = {}
    for tensor in tensors:
        found.setdefault(tensor.name, tensor)
    return tuple(found.values())


def _title(nodes: Sequence[Node], level: str) -> str:
    first = nodes[0]
    if level == MODEL:
        layers = sorted({node.layer for node in nodes if node.layer >= 0})
        more = [_ENDS[node.name] for node in nodes if node.name in _ENDS]
        said = (
            f"layer {layers[0]}"
            if len(layers) == 1
            else f"layers {layers[0]} to {layers[-1]}"
            if layers
            else ""
        )
        return f"Stage {first.stage}: {', '.join(filter(None, [said, *more]))}"
    if first.layer < 0:
        return "Final norm, LM head, sampling"
    return f"Layer {first.layer}: {_BLOCKS[first.block]}"


_BLOCKS: Mapping[str, str] = {"attention": "attention", "experts": "experts", "network": "dense network"}
_ENDS: Mapping[str, str] = {"embedding": "embedding", "lm_head": "LM head"}
