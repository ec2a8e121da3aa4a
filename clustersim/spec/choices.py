"""Keys that only some choices have a use for, such as `half_life`, which is one of motion "drifting".

Two rules. A file or a --set that chooses anew puts aside what files and options before it had said for other
choices: `--set gating.skew=even` works on a scenario with a Gini coefficient. And what is left, said together
with the choice or after it, must have a use: nothing is ignored silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

from clustersim.spec.deployment import SPARING, Experts
from clustersim.spec.documents import KeyPath, Leaf, Node, Table, overlay
from clustersim.spec.quantities import Value
from clustersim.spec.workload import Gating


@dataclass(frozen=True, slots=True)
class Use:
    """What a key is for.

    choosers  keys beside it that decide whether it has a use
    used      whether it has one, given the values of these
    by        choices that have a use for it, for messages
    nothing   values that ask for nothing, and so are right beside every choice
    """

    choosers: tuple[str, ...]
    used: Callable[[Mapping[str, Any]], bool]
    by: str
    nothing: tuple[Any, ...] = ()


def _known(chooser: str) -> tuple[str, ...]:
    return get_args(Gating.model_fields[chooser].annotation)


def _with(nothing: tuple[Any, ...] = (), **wanted: tuple[str, ...]) -> Use:
    """For one of these choices; a choice that is not known is told elsewhere."""
    useless = {chooser: set(_known(chooser)).difference(names) for chooser, names in wanted.items()}

    def used(values: Mapping[str, Any]) -> bool:
        return any(not isinstance(values[c], str) or values[c] not in useless[c] for c in wanted)

    by = " and of ".join(f"{c} {_listed(names)}" for c, names in wanted.items())
    return Use(tuple(wanted), used, by, nothing)


def _listed(names: tuple[str, ...]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


#: Motion → skews in which it would move nothing: no expert is hotter than others, or all have their places.
IDLE: Mapping[str, tuple[str, ...]] = {
    "still": (),
    "drifting": ("even", "uniform", "hot_rank", "replayed"),
    "bursting": ("even",),
    "rotating": ("even", "uniform"),
}
_HOT = ("hot", "hot_rank")
#: Skews whose experts are ranked, layer by layer.
_RANKED = ("zipf", "gini", "hot", "topics", "fitted")
_DRAWN = tuple(name for name in _known("skew") if name != "even")
#: Keys of a gating. What moves comes before what says how.
GATING: Mapping[str, Use] = {
    "motion": Use(("skew",), lambda v: v["skew"] not in IDLE.get(str(v["motion"]), ()), "other skews"),
    "exponent": _with(skew=("zipf",)),
    "gini": _with(skew=("gini", "topics")),
    "hot_experts": _with(skew=_HOT, motion=("rotating",)),
    "hot_share": _with(skew=_HOT),
    "hot_rank": _with(skew=("hot_rank",)),
    **{key: _with(skew=("topics",)) for key in ("topics", "topic_exponent", "topic_requests")},
    **{key: _with(skew=("fitted",)) for key in ("layers", "fitted_experts")},
    **{key: _with(("",), skew=("replayed",)) for key in ("counts", "measurement", "content")},
    "half_life": _with(motion=("drifting",)),
    **{key: _with(motion=("bursting",)) for key in ("burst_every", "burst_steps", "burst_share")},
    "rotate_every": _with(motion=("rotating",)),
    "correlation": _with((0, 0.0), skew=_RANKED),
    "node_limited": _with((False,), skew=_DRAWN),
}


def _has_copies(values: Mapping[str, Any]) -> bool:
    if values["policy"] in SPARING:
        return bool(values["spare"])
    return values["policy"] not in ("contiguous", "round_robin", "random", "balanced")


#: Keys of an expert policy; the others are looked at with the values.
EXPERTS: Mapping[str, Use] = {
    "copy_choice": Use(
        ("policy", "spare"),
        _has_copies,
        f"policy replicated, explicit, and {_listed(SPARING)} with spare",
        ("round_robin",),
    ),
}

#: Where such tables stand.
_TABLES: tuple[tuple[KeyPath, Mapping[str, Use], type[Value]], ...] = (
    (("gating",), GATING, Gating),
    (("beside", "gating"), GATING, Gating),
    (("deployment", "experts"), EXPERTS, Experts),
)


def laid_over(below: Node, above: Node) -> Node:
    """One layer of a scenario over those before it, with what its choices put aside left out of these."""
    for path, uses, kind in _TABLES:
        anew = _at(above, path)
        if anew is not None:
            below = changed(below, path, partial(_kept, above=anew, uses=uses, kind=kind))
    return overlay(below, above)


def unused(root: Node) -> Iterator[tuple[KeyPath, str]]:
    """Keys that nothing chosen beside them has a use for, each with a sentence."""
    for path, uses, kind in _TABLES:
        table = _at(root, path)
        if table is None:
            continue
        values = _values(kind, uses, table)
        for key, use in uses.items():
            child = table.children.get(key)
            if not isinstance(child, Leaf) or child.value in use.nothing or use.used(values):
                continue
            if not _written_out(child, table):
                chosen = " and ".join(f'{c} = "{values[c]}"' for c in use.choosers if c != "spare")
                yield (*path, key), f"changes nothing where {chosen}; it is a key of {use.by}"


def _written_out(child: Leaf, table: Table) -> bool:
    """Whether clustersim wrote the table, with all keys that there are: nobody else writes `content`."""
    mark = table.children.get("content")
    return mark is not None and mark.origin.document == child.origin.document


def _kept(below: Table, above: Table, uses: Mapping[str, Use], kind: type[Value]) -> Table:
    """What the choices of `above` leave of `below`."""
    children, chosen = dict(below.children), set(above.children)
    if chosen & {"counts", "measurement"} and "content" in children:
        children["content"] = Leaf("", children["content"].origin)
    for key, use in uses.items():
        if key not in children or key in above.children or chosen.isdisjoint(use.choosers):
            continue
        values = _values(kind, uses, replace(below, children=children), above)
        if not use.used(values):
            gone = children.pop(key)
            chosen.add(key)
            if key == "content":  # which stays as a mark of who wrote the table
                children[key] = Leaf("", gone.origin)
    return replace(below, children=children)


def _values(kind: type[Value], uses: Mapping[str, Use], *tables: Table) -> dict[str, Any]:
    """What the choosers are, of the last table that says so."""
    found = {c: kind.model_fields[c].default for use in uses.values() for c in use.choosers}
    for table in tables:
        for chooser in found:
            child = table.children.get(chooser)
            if child is not None:
                found[chooser] = child.value if isinstance(child, Leaf) else child
    return found


def _at(node: Node, path: KeyPath) -> Table | None:
    """The table at a key path, or None where there is none."""
    for key in path:
        if not isinstance(node, Table) or key not in node.children:
            return None
        node = node.children[str(key)]
    return node if isinstance(node, Table) else None


def changed(node: Node, path: KeyPath, change: Callable[[Table], Table]) -> Node:
    """The tree with the table at a key path changed, if there is one."""
    if not isinstance(node, Table):
        return node
    if not path:
        return change(node)
    key = str(path[0])
    if key not in node.children:
        return node
    return replace(node, children={**node.children, key: changed(node.children[key], path[1:], change)})
