"""A machine as a drawing: switches in tiers above, servers below, what is equal drawn once if there is much.

Plain SVG without scripts or outside references. Every box and line has a title that screen readers
read and browsers show; names come from files and are escaped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from clustersim.report.page import printable
from clustersim.report.topology import said_counts, said_kind, said_machine
from clustersim.units import show as quantity

#: Tiers from top to bottom; those of one row stand beside each other.
_TIERS = (("spine",), ("leaf", "router"), ("server", "nic", "gpu"), ("nvswitch",))
_TIER_NAMES = ("spines", "leaves", "servers", "NVLink planes")
#: Rows within a server, from top to bottom.
_INSIDE = ("nic", "gpu", "nvswitch")

_FILL = {
    "gpu": "#d5e8c8",
    "nic": "#fde3b0",
    "nvswitch": "#cfe3f5",
    "leaf": "#e6d9f2",
    "spine": "#d9d2ea",
    "router": "#e6d9f2",
    "server": "#eef3ea",
}
#: Pixels. A letter of the font is about 0.6 of its size wide.
_LETTER, _LINE, _PAD, _GAP = 7.0, 15.0, 7.0, 14.0
_TIER_GAP, _MARGIN, _LEFT, _HEAD = 90.0, 20.0, 110.0, 76.0
#: Copies seen behind a box that stands for several, and how far each is shifted.
_COPIES, _SHIFT = 2, 5.0
_BOLD = ' font-weight="bold"'


class _Spot(NamedTuple):
    """Where a node stands: left, top, width, height."""

    x: float
    y: float
    w: float
    h: float

    @property
    def middle(self) -> float:
        return self.x + self.w / 2


@dataclass(frozen=True, slots=True)
class _Frame:
    """A server whose parts are drawn one by one: the box around them."""

    name: str
    spot: _Spot
    parts: str


def topology_svg(found: Mapping[str, Any], drawing: Mapping[str, Any]) -> str:
    """The drawing as an SVG document.

    found    what `study.topology.inspect` gives
    drawing  what `study.topology.drawing` gives
    """
    nodes, detail = drawing["nodes"], drawing["detail"]
    pairs = _joined(drawing["bundles"])
    labels = [[*_labels(node, detail), *_among(pairs.get((n, n), {}))] for n, node in enumerate(nodes)]
    spots, frames, width, height = _placed(nodes, labels)
    width = max(width, _LEFT + len(said_machine(found)) * _LETTER)
    lines = [_line(nodes, spots, *ends, told, detail) for ends, told in pairs.items() if ends[0] != ends[1]]
    boxes = [_node(node, label, spot) for node, label, spot in zip(nodes, labels, spots, strict=True)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}" role="img" aria-labelledby="title about" '
            'font-family="sans-serif" font-size="12">',
            f'<title id="title">{_text(found["file"])}</title>',
            f'<desc id="about">{_text(_about(found, detail))}</desc>',
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
            f'<text x="{_MARGIN:g}" y="26" font-size="16" font-weight="bold">{_text(found["file"])}</text>',
            f'<text x="{_MARGIN:g}" y="46">{_text(said_machine(found))}</text>',
            *_tier_names(nodes, spots),
            *map(_framed, frames),
            *lines,
            *boxes,
            *(_labelled(nodes, spots, *ends, told) for ends, told in _worth_a_label(pairs, detail)),
            "</svg>\n",
        ]
    )


def _about(found: Mapping[str, Any], detail: str) -> str:
    shown = {
        "parts": "Every part is drawn.",
        "servers": "Each server is one box.",
        "kinds": "Equal servers and equal switches are drawn once, with their number.",
    }[detail]
    return f"{said_machine(found)}. {said_counts(found['vertices'])}. {shown}"


def _count(node: Mapping[str, Any]) -> int:
    """How many parts of the machine a box stands for."""
    return int(node["count"] * node["parts"].get(node["kind"], 1))


# ---- labels -------------------------------------------------------------------------------------


def _labels(node: Mapping[str, Any], detail: str) -> list[str]:
    """Lines of text in a box."""
    count, kind = _count(node), node["kind"]
    if detail == "kinds":
        name = f"{count:,} {said_kind(kind, count)}"
    elif kind == "nvswitch" and detail == "parts":
        name = said_kind(kind)
    else:
        name = printable(node["name"])
        name = name.rpartition("/")[2] if node["server"] >= 0 and kind != "server" else name
    if kind != "server":
        return [name]
    inside = [f"{number} {said_kind(part, number)}" for part, number in node["parts"].items()]
    return [name, *(f"{line} each" if detail == "kinds" and count > 1 else line for line in inside)]


#: Cables and bytes/s of all of them together, in the wider direction.
_Told = tuple[int, float]
#: Two nodes → what joins them, by tier; duplex links are drawn once.
_Pairs = Mapping[tuple[int, int], Mapping[str, _Told]]

#: Tiers whose two ends may be drawn as one box.
_AMONG = {"router-router": "within groups", "group-group": "between groups"}


def _among(told: Mapping[str, _Told]) -> list[str]:
    """What joins boxes that are drawn as one."""
    return [f"{_AMONG.get(tier, 'among them')} {_said_bundle({tier: one})}" for tier, one in told.items()]


def _joined(bundles: Sequence[Mapping[str, Any]]) -> _Pairs:
    found: dict[tuple[int, int], dict[str, _Told]] = defaultdict(dict)
    for bundle in bundles:
        a, b = sorted((bundle["source"], bundle["target"]))
        tier = "-".join(sorted(bundle["tier"].split("-")))
        cables, bandwidth = bundle["cables"], bundle["bandwidth"]
        if a == b:  # Both directions were counted.
            cables, bandwidth = max(1, cables // 2), bandwidth / 2
        if bandwidth > found[a, b].get(tier, (0, 0.0))[1]:
            found[a, b][tier] = cables, bandwidth
    return found


def _said_bundle(told: Mapping[str, _Told]) -> str:
    return " and ".join(
        f"{f'{cables:,} x ' if cables > 1 else ''}{quantity(bandwidth / cables, 'bandwidth')}"
        for cables, bandwidth in told.values()
    )


def _worth_a_label(pairs: _Pairs, detail: str) -> Iterator[tuple[tuple[int, int], Mapping[str, _Told]]]:
    if detail == "kinds":
        yield from ((ends, told) for ends, told in pairs.items() if ends[0] != ends[1])


# ---- places -------------------------------------------------------------------------------------


def _placed(
    nodes: Sequence[Mapping[str, Any]], labels: Sequence[Sequence[str]]
) -> tuple[list[_Spot], list[_Frame], float, float]:
    """Where every node and every frame stands, and how wide and high all of it is."""
    sizes = _aligned(nodes, [_size(node, label) for node, label in zip(nodes, labels, strict=True)])
    rows: list[list[list[int]]] = []  # tiers of blocks of nodes; a server with its parts is one block
    for kinds in _TIERS:
        blocks: dict[object, list[int]] = defaultdict(list)
        for n, node in enumerate(nodes):
            inside = node["kind"] in _INSIDE and node["server"] >= 0
            if (node["kind"] in kinds and not inside) or (inside and "gpu" in kinds):
                blocks[("server", node["server"]) if inside else n].append(n)
        rows.append(list(blocks.values()))
    spots: list[_Spot] = [_Spot(0, 0, 0, 0)] * len(nodes)
    frames: list[_Frame] = []
    widths = [[_block_width(nodes, sizes, block) for block in blocks] for blocks in rows]
    whole = max((sum(row) + _GAP * len(row) for row in widths if row), default=0.0)
    top = _HEAD
    for tier, row in zip(rows, widths, strict=True):
        if not tier:
            continue
        gap = (whole - sum(row)) / len(row)  # spread over the whole width, half a gap at each end
        left, lowest = _LEFT + gap / 2, top
        for block, width in zip(tier, row, strict=True):
            bottom = _put_block(nodes, sizes, block, _Spot(left, top, width, 0), spots, frames)
            lowest, left = max(lowest, bottom), left + width + gap
        top = lowest + _TIER_GAP
    return spots, frames, _LEFT + whole + _MARGIN + _COPIES * _SHIFT, top - _TIER_GAP + _MARGIN


def _size(node: Mapping[str, Any], label: Sequence[str]) -> tuple[float, float]:
    wide = max(len(line) for line in label)
    # What stands for many is drawn wide, so that the labels of its links find room.
    least = 18 if node["count"] > 1 else 0
    return max(wide, least) * _LETTER + 2 * _PAD, len(label) * _LINE + _PAD


def _aligned(
    nodes: Sequence[Mapping[str, Any]], sizes: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """GPUs and cards within servers get one width, so that each card stands above its GPU."""
    alike = {n for n, node in enumerate(nodes) if node["kind"] in ("gpu", "nic") and node["server"] >= 0}
    widest = max((sizes[n][0] for n in alike), default=0.0)
    return [(widest, size[1]) if n in alike else size for n, size in enumerate(sizes)]


def _is_framed(nodes: Sequence[Mapping[str, Any]], block: Sequence[int]) -> bool:
    return nodes[block[0]]["kind"] in _INSIDE and nodes[block[0]]["server"] >= 0


def _lanes(nodes: Sequence[Mapping[str, Any]], block: Sequence[int]) -> list[list[int]]:
    lanes = [[n for n in block if nodes[n]["kind"] == kind] for kind in _INSIDE]
    return [lane for lane in lanes if lane]


def _block_width(
    nodes: Sequence[Mapping[str, Any]], sizes: Sequence[tuple[float, float]], block: Sequence[int]
) -> float:
    if not _is_framed(nodes, block):
        return sizes[block[0]][0]
    lanes = [sum(sizes[n][0] + _PAD for n in lane) for lane in _lanes(nodes, block)]
    return max(lanes) + _PAD


def _put_block(
    nodes: Sequence[Mapping[str, Any]],
    sizes: Sequence[tuple[float, float]],
    block: Sequence[int],
    at: _Spot,
    spots: list[_Spot],
    frames: list[_Frame],
) -> float:
    """Sets the spots of a block's nodes; returns its lower edge."""
    if not _is_framed(nodes, block):
        n = block[0]
        spots[n] = _Spot(at.x, at.y, *sizes[n])
        return at.y + sizes[n][1]
    y = at.y + _PAD
    for lane in _lanes(nodes, block):
        x = at.x + (at.w - sum(sizes[n][0] + _PAD for n in lane) + _PAD) / 2
        for n in lane:
            spots[n] = _Spot(x, y, *sizes[n])
            x += sizes[n][0] + _PAD
        y += sizes[lane[0]][1] + _TIER_GAP / 3
    bottom = y - _TIER_GAP / 3 + _LINE + _PAD
    counts = {kind: sum(nodes[n]["kind"] == kind for n in block) for kind in _INSIDE}
    parts = said_counts({kind: count for kind, count in counts.items() if count})
    frames.append(_Frame(f"server {nodes[block[0]]['server']}", at._replace(h=bottom - at.y), parts))
    return bottom


# ---- shapes -------------------------------------------------------------------------------------


def _text(text: str) -> str:
    return escape(printable(text))


def _node(node: Mapping[str, Any], label: Sequence[str], spot: _Spot) -> str:
    fill, (x, y, w, h) = _FILL[node["kind"]], spot
    said = ", ".join(label)
    title = said if node["count"] > 1 else f"{printable(node['name'])}: {said}"
    rects = (
        f'<rect x="{x + k * _SHIFT:.1f}" y="{y - k * _SHIFT:.1f}" width="{w:.1f}" height="{h:.1f}" '
        f'rx="4" fill="{fill}" stroke="#555"/>'
        for k in range(_COPIES if node["count"] > 1 else 0, -1, -1)
    )
    texts = (
        f'<text x="{spot.middle:.1f}" y="{y + _LINE * (k + 1):.1f}" text-anchor="middle"{weight}>'
        f"{_text(line)}</text>"
        for k, (line, weight) in enumerate(
            zip(label, [_BOLD if len(label) > 1 else "", *[""] * (len(label) - 1)], strict=True)
        )
    )
    return "".join([f"<g><title>{escape(title)}</title>", *rects, *texts, "</g>"])


def _framed(frame: _Frame) -> str:
    x, y, w, h = frame.spot
    return (
        f"<g><title>{_text(frame.name)}: {_text(frame.parts)}</title>"
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="6" '
        f'fill="{_FILL["server"]}" stroke="#999"/>'
        f'<text x="{frame.spot.middle:.1f}" y="{y + h - _PAD:.1f}" text-anchor="middle" fill="#444">'
        f"{_text(frame.name)}</text></g>"
    )


def _line(
    nodes: Sequence[Mapping[str, Any]],
    spots: Sequence[_Spot],
    a: int,
    b: int,
    told: Mapping[str, _Told],
    detail: str,
) -> str:
    """From the lower edge of the upper box to the upper edge of the lower one; in one row, a bow below."""
    upper, lower = sorted((spots[a], spots[b]), key=lambda spot: spot.y)
    names = (f"{printable(nodes[n]['name'])}" for n in (a, b))
    if detail == "kinds":
        names = (said_kind(nodes[n]["kind"], _count(nodes[n])) for n in (a, b))
    title = f"{' - '.join(names)}: {_said_bundle(told)} each way"
    start, end = (upper.middle, upper.y + upper.h), (lower.middle, lower.y)
    way = f"M{start[0]:.1f} {start[1]:.1f} L{end[0]:.1f} {end[1]:.1f}"
    if lower.y < upper.y + upper.h:
        end = (lower.middle, lower.y + lower.h)
        bow = 12 + abs(end[0] - start[0]) / 8
        way = (
            f"M{start[0]:.1f} {start[1]:.1f} Q{(start[0] + end[0]) / 2:.1f} "
            f"{max(start[1], end[1]) + bow:.1f} {end[0]:.1f} {end[1]:.1f}"
        )
    return (
        f'<path d="{way}" fill="none" stroke="#667" stroke-opacity="0.6" '
        f'stroke-width="{3 if detail == "kinds" else 1.2}"><title>{escape(title)}</title></path>'
    )


def _labelled(
    nodes: Sequence[Mapping[str, Any]], spots: Sequence[_Spot], a: int, b: int, told: Mapping[str, _Told]
) -> str:
    """How many links, and of what bandwidth, beside the middle of a line."""
    upper, lower = sorted((spots[a], spots[b]), key=lambda spot: spot.y)
    x = (upper.middle + lower.middle) / 2 + 8
    y = (upper.y + upper.h + lower.y) / 2
    cables = sum(number for number, _ in told.values())
    per = [
        f"{cables // _count(nodes[n]):,} per {said_kind(nodes[n]['kind'])}"
        for n in (a, b)
        if _count(nodes[n]) > 1 and cables % _count(nodes[n]) == 0
    ]
    return (
        f'<text x="{x:.1f}" y="{y:.1f}">{escape(_said_bundle(told))}</text>'
        f'<text x="{x:.1f}" y="{y + _LINE:.1f}" fill="#555">{escape(", ".join(per))}</text>'
    )


def _tier_names(nodes: Sequence[Mapping[str, Any]], spots: Sequence[_Spot]) -> Iterator[str]:
    """At the left edge, what a row is."""
    for kinds, name in zip(_TIERS, _TIER_NAMES, strict=True):
        inside = "server" in kinds
        tops = [
            spot.y
            for node, spot in zip(nodes, spots, strict=True)
            if node["kind"] in kinds or (inside and node["server"] >= 0)
            if not (not inside and node["kind"] == "nvswitch" and node["server"] >= 0)
        ]
        kinds_there = {node["kind"] for node in nodes}
        if tops:
            said = "routers" if "router" in kinds and "leaf" not in kinds_there else name
            yield f'<text x="{_MARGIN:g}" y="{min(tops) + _LINE:.1f}" fill="#555">{said}</text>'
