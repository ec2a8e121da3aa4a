"""The label of what a scenario is set beside, where an option changes that and leaves the label alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from clustersim.spec.choices import changed
from clustersim.spec.documents import Document, Leaf, Node, Table
from clustersim.spec.workload import Gating

#: Characters that a label may have (`spec.workload.Beside`).
_LONGEST = 40
#: Keys that words of a gating leave out: whole tables, and what no file of a user says.
_LEFT_OUT = ("layers", "content")


def relabelled(root: Node, main: Document) -> Node:
    """The scenario, its `beside` labelled by its keys if an option, or the file over the one that it
    extends, changed the gating and not the label: a label that names another gating is false.

    main    the scenario's own file
    """
    return changed(root, ("beside",), lambda beside: _labelled(beside, main))


def _labelled(beside: Table, main: Document) -> Table:
    label, gating = (beside.children.get(key) for key in ("label", "gating"))
    if not isinstance(label, Leaf) or not isinstance(gating, Table):
        return beside
    changed_last = max((_lateness(leaf, main) for leaf in _leaves(gating)), default=0)
    if changed_last <= _lateness(label, main):
        return beside
    said = ", ".join(
        f"{key} {child.value}"
        for key, child in sorted(gating.children.items(), key=lambda pair: pair[0] != "skew")
        if isinstance(child, Leaf)
        and key not in _LEFT_OUT
        # Files that a program wrote list every key: those at their defaults say nothing.
        and (key == "skew" or _lateness(child, main) == changed_last or child.value != _default(key))
    )
    words = said if len(said) <= _LONGEST else f"{said[: _LONGEST - 4]} ..."
    return replace(beside, children={**beside.children, "label": Leaf(words, label.origin)})


def _default(key: str) -> object:
    field = Gating.model_fields.get(key)
    return None if field is None else field.default


def _lateness(leaf: Leaf, main: Document) -> int:
    """Options come after the scenario's file, and that after what it extends."""
    document = leaf.origin.document
    return 2 if document.command_line else int(document.shown == main.shown)


def _leaves(table: Table) -> Iterator[Leaf]:
    for child in table.children.values():
        if isinstance(child, Leaf):
            yield child
        else:
            yield from _leaves(child)
