"""Critical paths in few lines: parts that follow each other in a layer, or all of a cause, as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import fsum
from typing import Any

from clustersim.analysis.critical_path import CAUSES, Part, Path
from clustersim.analysis.path_words import together

#: What the rank on the path does itself.
_NO_WAITING = ("compute", "launch")
#: What differs by layer.
_BY_LAYER = ("imbalance", "queue")
#: Layers that are named one by one.
_NAMED_LAYERS = 3


@dataclass(frozen=True, slots=True)
class Line:
    """Several parts of a path.

    start    s, of the first of them; seconds: of all
    where    what they have in common, in words
    causes   cause → s, longest first
    does     operator → s of what is computed or sent in them, longest first
    words    of the longest part, which tells what it is about
    parts    how many
    """

    start: float
    seconds: float
    where: str
    causes: dict[str, float]
    does: dict[str, float]
    words: str
    parts: int


def in_order(path: Path, most: int) -> list[Line]:
    """The path in order of time, at most about so many lines: by layer, or where these are too many by
    token batch and stage, or by step."""
    for key, where in _BY_TIME:
        lines = [_line(run, where(run[0])) for run in _runs(path, key)]
        if len(lines) <= most:
            break
    return lines


def _runs(path: Path, key: Callable[[Part], Hashable]) -> list[list[Part]]:
    return [list(parts) for _, parts in groupby(path.parts, key=key)]


#: Finest first: what parts have in common that stand together, and how it is said.
_BY_TIME: tuple[tuple[Callable[[Part], Hashable], Callable[[Part], str]], ...] = (
    (
        lambda p: (p.token_batch, p.stage, p.layer, p.rank),
        lambda p: f"{_layer(p)}, stage {p.stage}, rank {p.rank}, token batch {p.token_batch}",
    ),
    (
        lambda p: (p.token_batch, p.stage, p.layer),
        lambda p: f"{_layer(p)}, stage {p.stage}, token batch {p.token_batch}",
    ),
    (lambda p: (p.token_batch, p.stage), lambda p: f"stage {p.stage}, token batch {p.token_batch}"),
    (lambda p: p.token_batch, lambda p: f"token batch {p.token_batch}"),
)


def _layer(part: Part) -> str:
    return f"layer {part.layer}" if part.layer >= 0 else "outside the layers"


def by_cause(path: Path) -> list[Line]:
    """All parts of a cause as one line, longest first."""
    return _gathered(path.parts, lambda p: p.cause, lambda p: CAUSES[p.cause])


def by_operator(path: Path) -> list[Line]:
    """All parts of an operator as one line, longest first."""
    return _gathered(path.parts, lambda p: p.operator, lambda p: p.operator or "before the first step")


def by_layer(path: Path) -> list[Line]:
    """All parts of a layer as one line, longest first."""
    return _gathered(path.parts, lambda p: p.layer, _layer)


def by_words(path: Path) -> list[Line]:
    """All parts of which the same is said, figures apart, as one line, longest first; what the rank on the
    path does itself, computing and launching, is no waiting and left out."""
    held: dict[tuple[str, str], list[Part]] = {}
    for part in path.parts:
        if part.cause not in _NO_WAITING:
            held.setdefault((part.cause, part.about.text), []).append(part)
    lines = []
    for parts in held.values():
        said = together([part.about for part in parts]) + _in_layers(parts)
        lines.append(replace(_line(parts, said), words=said))
    return sorted(lines, key=lambda line: (-line.seconds, line.start))


def _in_layers(parts: Sequence[Part]) -> str:
    """In which layers a rank was a straggler, or an expert in front of others, is part of what is said."""
    layers = sorted({part.layer for part in parts if part.layer >= 0})
    if parts[0].cause not in _BY_LAYER or not layers:
        return ""
    if len(layers) <= _NAMED_LAYERS:
        return f", in layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
    return f", in {len(layers)} layers from {layers[0]} to {layers[-1]}"


#: Name → how parts are put together.
GROUPS: dict[str, Callable[[Path], list[Line]]] = {
    "cause": by_cause,
    "operator": by_operator,
    "layer": by_layer,
}


def _gathered(
    parts: Iterable[Part], key: Callable[[Part], Hashable], where: Callable[[Part], str]
) -> list[Line]:
    held: dict[Hashable, list[Part]] = {}
    for part in parts:
        held.setdefault(key(part), []).append(part)
    lines = [_line(group, where(group[0])) for group in held.values()]
    return sorted(lines, key=lambda line: (-line.seconds, line.start))


def _line(parts: Sequence[Part], where: str) -> Line:
    causes: dict[str, list[float]] = {}
    does: dict[str, list[float]] = {}
    for part in parts:
        causes.setdefault(part.cause, []).append(part.seconds)
        does.setdefault(part.operator, []).append(part.seconds)
    longest = max(parts, key=lambda part: part.seconds)
    return Line(
        parts[0].start, fsum(part.seconds for part in parts), where, _longest_first(causes),
        _longest_first(does), longest.words, len(parts),
    )  # fmt: skip


def _longest_first(held: dict[str, list[float]]) -> dict[str, float]:
    sums = {name: fsum(seconds) for name, seconds in held.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def as_json(path: Path, by: str, whole: bool) -> dict[str, Any]:
    """A path as JSON values; whole: with every part, else with lines `by` a key of GROUPS."""
    found: dict[str, Any] = {
        "what": path.what,
        "number": path.number,
        "start": path.start,
        "end": path.end,
        "latency": path.latency,
        "causes": path.seconds(),
        "in_bubbles": path.in_bubbles(),
    }
    if whole:
        parts = [{k: v for k, v in asdict(part).items() if k != "about"} for part in path.parts]
        return found | {"parts": parts}
    return found | {"lines": [asdict(line) for line in GROUPS[by](path)]}
