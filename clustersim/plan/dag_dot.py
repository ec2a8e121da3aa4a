"""A drawing as DOT, line by line while it is being made, and as SVG."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import wrap

import numpy as np
import pygraphviz

from clustersim.errors import ClustersimError
from clustersim.plan.dag import COMMUNICATION, COMPUTATION, END, REST, ROUTING, Dim, Edge, Node, Part, Tensor

#: Shapes and colours by kind, those of the documents: ellipses in orange, rectangles in green,
#: parallelograms in yellow. What stands for left-out parts is dashed.
_LOOKS = {
    COMMUNICATION: 'shape=ellipse, fillcolor="#fbc687", color="#b5651d"',
    COMPUTATION: 'shape=box, fillcolor="#c5e8b7", color="#3c763d"',
    ROUTING: 'shape=parallelogram, fillcolor="#fff3a3", color="#9a8500"',
    REST: 'shape=box, style="filled,dashed", fillcolor="#f7f7f7", color="#777777"',
    END: 'shape=box, style="filled,rounded", fillcolor="#e4e8ef", color="#445566"',
}
_LEGEND = (
    "orange ellipses: communication; green boxes: computation; "
    "yellow parallelograms: routing and aggregation; dashed boxes: left out\n"
    "dashed arrows: as the gate selects; grey arrows: the residual stream; "
    "sizes: on one GPU / of all GPUs together"
)

#: Ends of the ids of nodes that stand beside the axis of their layer.
_ASIDE = (".gate", ".top_k")
#: Letters in a line of what stands beside many like it.
_NARROW = 35
#: Ranges of GPUs that are named one by one.
_RANGES = 3


def dot_lines(parts: Iterable[Part], title: str, boxes: bool = True, hints: bool = False) -> Iterator[str]:
    """A DOT document. Only one layer's names and the edges that leave it are held meanwhile.

    boxes  one around every stage and every layer
    hints  with what keeps heads and experts in their order, for a layout: arrows that are not seen
    """
    yield "digraph deployment {\n"
    yield f"graph [label={quoted(f'{title}{chr(10)}{_LEGEND}')}, labelloc=t, rankdir=TB, "
    room = "ranksep=0.6, pad=0.5" if hints else "ranksep=0.3"
    yield f'fontname="Helvetica", fontsize=14, nodesep=0.12, {room}]\n'
    yield 'node [style=filled, fontname="Helvetica", fontsize=10, margin="0.06,0.04"]\n'
    yield 'edge [arrowsize=0.6, color="#333333"]\n'
    cluster: tuple[int, int] = _NO_BOX
    inside: set[str] = set()
    across: list[str] = []
    before: Node | None = None
    for node, edges in _with_edges(parts):
        place = _cluster(node) if boxes else _NO_BOX
        if place != cluster:
            yield from _closed(cluster, place)
            if place[0] != cluster[0]:
                yield from across
                across = []
            yield from _opened(cluster, place)
            cluster, inside = place, set()
        inside.add(node.id)
        yield _node(node)
        if hints and before is not None and (before.operator, before.name) == (node.operator, node.name):
            yield f"{{ rank=same; {quoted(before.id)} -> {quoted(node.id)} [style=invis] }}\n"
        before = node if node.operator >= 0 else None
        for source, line in _edges(edges):
            # An edge within a box would draw both of its ends into it.
            if source in inside:
                yield line
            else:
                across.append(line)
    yield from _closed(cluster, _NO_BOX)
    yield from across
    yield "}\n"


_NO_BOX = (-1, -1)


def _with_edges(parts: Iterable[Part]) -> Iterator[tuple[Node, list[Edge]]]:
    """Every node with the edges that lead to it."""
    node, edges = None, list[Edge]()
    for part in parts:
        if isinstance(part, Edge):
            edges.append(part)
            continue
        if node is not None:
            yield node, edges
        node, edges = part, []
    if node is not None:
        yield node, edges


def _cluster(node: Node) -> tuple[int, int]:
    """Stage and layer of the box a node stands in; -1: in none."""
    between = (
        len(node.takes) == 1 and len(node.gives) == 1 and node.takes[0].ranks[0] != node.gives[0].ranks[0]
    )
    outside = node.kind == END or node.name == "stage_transfer" or between
    return _NO_BOX if outside else (node.stage, node.layer)


def _closed(here: tuple[int, int], there: tuple[int, int]) -> Iterator[str]:
    if here[1] >= 0:
        yield "}\n"
    if here[0] != there[0] and here[0] >= 0:
        yield "}\n"


def _opened(here: tuple[int, int], there: tuple[int, int]) -> Iterator[str]:
    stage, layer = there
    if here[0] != stage and stage >= 0:
        yield f'subgraph cluster_s{stage} {{ label="stage {stage}"; color="#8899aa";\n'
    if layer >= 0:
        yield f'subgraph cluster_s{stage}_l{layer} {{ label="layer {layer}"; color="#bbc4cc";\n'


def _node(node: Node) -> str:
    lines = [node.title, _where(node)]
    lines += [f"in {line}" for line in _sizes(node.takes)]
    lines += [f"out {line}" for line in _sizes(node.gives)]
    lines += [node.note] if node.note else []
    if node.members:  # Many of them stand side by side.
        lines = [short.replace(_TIE, " ") for line in lines for short in wrap(_tied(line), _NARROW)]
    tip = f"{node.id}: {node.name.replace('_', ' ')}"
    tip += f", {node.flop:,.4g} FLOP" if node.flop else ""
    tip += f", {node.sent:,.4g} bytes exchanged" if node.sent else ""
    label, hint = quoted("\n".join(lines)), quoted(tip)
    more = _sized(lines) if node.kind == ROUTING else ""
    return f"{quoted(node.id)} [{_LOOKS[node.kind]}{more}, label={label}, tooltip={hint}]\n"


#: Between words that stay in one line.
_TIE = "\u00a0"


def _tied(line: str) -> str:
    """A size and its name stay together."""
    return re.sub(r" (?=[\d/,.-]+[,\]])", _TIE, line)


def _where(node: Node) -> str:
    if node.takes and node.gives and node.takes[0].ranks[0] != node.gives[0].ranks[0]:
        return f"{said_gpus(node.takes[0].ranks)} to {said_gpus(node.gives[0].ranks)}"
    return said_gpus(node.ranks)


def _sized(lines: Sequence[str]) -> str:
    """Graphviz makes a parallelogram twice as high and wide as its text; this one is just large enough.

    Of Helvetica at 10 points: letters are about 5 points wide, a line is 12 points high.
    """
    height = (len(lines) * 12 + 8) / 72
    width = max(map(len, lines)) * 5.1 / 72 + 1.1 * height
    return f", fixedsize=true, width={width:.2f}, height={height:.2f}"


def _edges(edges: Iterable[Edge]) -> Iterator[tuple[str, str]]:
    """Source and line of every arrow: tensors between the same two nodes share one."""
    alike: dict[tuple[str, bool], list[Edge]] = {}
    for edge in edges:
        alike.setdefault((edge.source, edge.selection), []).append(edge)
    for (source, selection), some in alike.items():
        styles = ["style=dashed"] if selection else []
        if all(edge.taken.name == "stream" for edge in some):
            # Past a block they lead along its side, into it they are its axis.
            styles.append(
                'color="#8a8a8a"' + (", weight=8" if not some[0].target.endswith("residual") else "")
            )
        elif some[0].taken.key is None and not selection and not some[0].target.endswith(_ASIDE):
            styles.append("weight=4")
        tips = [f"{_NAMES.get(e.taken.name, e.taken.name)} {said_dims(e.taken.dims)}" for e in some]
        attributes = ", ".join([*styles, f"tooltip={quoted(', '.join(tips))}"])
        yield source, f"{quoted(source)} -> {quoted(some[0].target)} [{attributes}]\n"


def _sizes(tensors: Iterable[Tensor]) -> list[str]:
    """Tensors in words; those of the same size in one line, by their names where there are several."""
    alike: dict[str, list[str]] = {}
    for tensor in tensors:
        if not (tensor.selects and tensor.name == "choices"):
            alike.setdefault(said_dims(tensor.dims), []).append(_NAMES.get(tensor.name, tensor.name))
    several = sum(map(len, alike.values())) > 1
    return [f"{', '.join(names)} {dims}" if several else dims for dims, names in alike.items()]


_NAMES = {
    "delta": "what is added",
    "latent_q": "query latents",
    "latent_kv": "latents",
    "key_rope": "key positions",
}
_NAMES |= {"query_rope": "query positions", "kv": "keys and values"}


def said_dims(dims: Iterable[Dim]) -> str:
    """[tokens 128/8,192, heads 16/32, d 128]: on one GPU, and of all where that is more."""
    return "[" + ", ".join(f"{dim.name} {_said_dim(dim)}" for dim in dims) + "]"


def _said_dim(dim: Dim) -> str:
    here = _number(dim.least) if dim.least == dim.most else f"{_number(dim.least)}-{_number(dim.most)}"
    return here if dim.least == dim.most == dim.whole else f"{here}/{_number(dim.whole)}"


def _number(value: float) -> str:
    if 0 < value < 1:
        return f"1/{1 / value:,.3g}"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def said_gpus(ranks: np.ndarray) -> str:
    """GPUs 0-127, GPUs 0, 2, ..., 126, or how many where they are in no order."""
    each = np.unique(ranks)
    if len(each) == 1:
        return f"GPU {each[0]}"
    steps = np.diff(each)
    if (steps == 1).all():
        return f"GPUs {each[0]}-{each[-1]}"
    if len(each) > 3 and (steps == steps[0]).all():
        return f"GPUs {each[0]}, {each[1]}, …, {each[-1]} ({len(each):,})"
    cuts = np.flatnonzero(steps != 1) + 1
    runs = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in np.split(each, cuts)]
    return f"GPUs {', '.join(runs[:_RANGES])}" + (f", … ({len(each):,})" if len(runs) > _RANGES else "")


_UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def quoted(text: str) -> str:
    """Text as a DOT string: quotes, backslashes and what cannot be seen are made harmless.

    In labels a backslash begins an escape of its own (\\N is the node's name), so that it is doubled; line
    ends become \\n, a centred line.
    """
    plain = _UNSEEN.sub("�", text)
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def to_svg(parts: Sequence[Part], title: str, boxes: bool = True) -> str:
    """A drawing laid out by the Graphviz that comes with pygraphviz.

    Within boxes Graphviz forgets in which order heads and experts were to stand. So it lays out the graph
    without them, and they are put behind it.

    Raises   ClustersimError where it cannot
    """
    with _silent():
        try:
            graph = pygraphviz.AGraph(string="".join(dot_lines(parts, title, boxes=False, hints=True)))
            graph.layout(prog="dot")
            drawn = graph.draw(format="svg")
        except Exception as error:  # whatever the library may raise: none of it is ours
            raise ClustersimError(f"the drawing cannot be laid out: {error}") from error
    text: str = drawn.decode("utf-8")
    if not boxes:
        return text
    background = re.search(r'<polygon fill="white".*?/>\n', text)
    at = background.end() if background else 0
    return text[:at] + "".join(_boxes(graph, parts)) + text[at:]


#: Points between a box and what stands in it, and above besides for its name; of layers and of stages.
_LAYER_BOX, _STAGE_BOX = (8.0, 12.0), (14.0, 24.0)


def _boxes(graph: pygraphviz.AGraph, parts: Sequence[Part]) -> Iterator[str]:
    """A rectangle around the nodes of every stage and every layer, as SVG."""
    held: dict[tuple[int, int], list[str]] = {}
    for part in parts:
        if isinstance(part, Node) and (place := _cluster(part)) != _NO_BOX:
            for box in dict.fromkeys(((place[0], -1), place)):
                held.setdefault(box, []).append(part.id)
    for (stage, layer), names in held.items():
        room, head = _LAYER_BOX if layer >= 0 else _STAGE_BOX
        left, bottom, right, top = _around([graph.get_node(name).attr for name in names])
        x, y = left - room, -top - room - head
        width, height = right - left + 2 * room, top - bottom + 2 * room + head
        said, colour = (f"layer {layer}", "#bbc4cc") if layer >= 0 else (f"stage {stage}", "#8899aa")
        yield (
            f'<g class="box"><title>{said}</title><rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" rx="4" fill="none" stroke="{colour}"/>'
            f'<text x="{x + 6:.1f}" y="{y + 13:.1f}" '
            f'font-family="Helvetica,sans-Serif" font-size="14" fill="#445566">{said}</text></g>\n'
        )


def _around(attributes: Sequence[Mapping[str, str]]) -> tuple[float, float, float, float]:
    """Left, lower, right and upper edge of all nodes, points; sizes of nodes are inches."""
    edges = []
    for node in attributes:
        x, y = map(float, node["pos"].split(","))
        wide, high = float(node["width"]) * 36, float(node["height"]) * 36
        edges.append((x - wide, y - high, x + wide, y + high))
    lefts, lowers, rights, uppers = zip(*edges, strict=True)
    return min(lefts), min(lowers), max(rights), max(uppers)


@contextmanager
def _silent() -> Iterator[None]:
    """Graphviz and its fonts talk to standard error by themselves, of what does not concern the user."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as away:
        os.dup2(away.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
