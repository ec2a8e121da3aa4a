"""Where the durations of a run come from: measured, interpolated, extrapolated, or a formula alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from clustersim.analysis.latency import numbers, words
from clustersim.trace.record import Trace

#: Best first, as the trace names them.
ORIGINS = ("measured", "interpolated", "extrapolated", "formula")
_BEYOND = ("extrapolated", "formula")
#: Share of the computing time beyond measurements from which on a run warns.
BEYOND_STANDS_OUT = 0.1
#: What `deployment.kernels` says where no library was asked for.
_ANY = "auto"
#: Operators named in the summary, and in the warning.
_LISTED, _NAMED = 12, 3


def prices(trace: Trace) -> dict[str, Any] | None:
    """How computing was priced, by share of its simulated time; None where nothing was computed.

    Returns  shares {origin → share}; bases [{basis, share}], largest first; beyond [{operator, kernel,
             origin, basis, share, octaves}]: what lies outside of measurements, largest share first
    """
    table = trace.tables["prices"]
    seconds = numbers(table, "seconds").astype(float)
    whole = float(seconds.sum())
    if whole <= 0:
        return None
    origin, basis = words(table, "origin"), words(table, "basis")
    shares = {name: float(seconds[origin == name].sum()) / whole for name in ORIGINS}
    return {"shares": shares, "bases": _bases(basis, seconds / whole), "beyond": _beyond(trace, whole)}


def by_operator(trace: Trace) -> list[dict[str, Any]]:
    """How each operator was priced, the longest computing time first.

    Returns  operator, kernel, format, basis, origin, count (priced so, over all ranks), seconds (added up
             over all ranks), share of all computing, octaves (the furthest beyond what was measured)
    """
    table = trace.tables["prices"]
    names = ("operator", "kernel", "format", "basis", "origin")
    found: dict[tuple[str, ...], list[float]] = {}
    amounts = [numbers(table, name).tolist() for name in ("count", "seconds", "outside")]
    for *key, count, seconds, outside in zip(*(words(table, n) for n in names), *amounts, strict=True):
        held = found.setdefault(tuple(key), [0, 0.0, 0.0])
        found[tuple(key)] = [held[0] + count, held[1] + seconds, max(held[2], outside)]
    whole = sum(seconds for _, seconds, _ in found.values())
    return [
        dict(zip(names, key, strict=True))
        | {"count": count, "seconds": seconds, "share": seconds / whole if whole else 0.0}
        | {"octaves": outside}
        for key, (count, seconds, outside) in sorted(found.items(), key=lambda item: (-item[1][1], item[0]))
    ]


def _bases(basis: np.ndarray, share: np.ndarray) -> list[dict[str, Any]]:
    names = sorted(set(basis.tolist()))
    each = {name: float(share[basis == name].sum()) for name in names}
    return [{"basis": name, "share": each[name]} for name in sorted(names, key=lambda name: -each[name])]


def _beyond(trace: Trace, whole: float) -> list[dict[str, Any]]:
    table = trace.tables["prices"]
    found: dict[tuple[str, ...], tuple[float, float]] = {}
    columns = [words(table, name) for name in ("operator", "kernel", "origin", "basis")]
    for *key, seconds, outside in zip(
        *columns, numbers(table, "seconds").tolist(), numbers(table, "outside").tolist(), strict=True
    ):
        if key[2] in _BEYOND:
            held = found.get(tuple(key), (0.0, 0.0))
            found[tuple(key)] = (held[0] + seconds, max(held[1], outside))
    ordered = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))
    return [
        dict(zip(("operator", "kernel", "origin", "basis"), key, strict=True))
        | {"share": seconds / whole, "octaves": outside}
        for key, (seconds, outside) in ordered[:_LISTED]
    ]


def price_notes(trace: Trace, found: dict[str, Any] | None) -> Iterator[str]:
    """Sentences on a run that rests on more than measurements."""
    if found is None:
        return
    gpu = trace.facts.get("gpu_model")
    if found["shares"]["formula"] >= BEYOND_STANDS_OUT and not any(one["basis"] for one in found["bases"]):
        yield f"No kernel of {gpu} or a relative was measured: computing is priced by its data sheet alone."
        return
    yield from _library_note(trace, found)
    others = {one["basis"].split()[0]: one["share"] for one in reversed(found["bases"]) if one["basis"]}
    foreign = [name for name in others if name != gpu]
    if foreign:
        share = sum(one["share"] for one in found["bases"] if one["basis"].split()[:1] != [gpu])
        yield (
            f"{share:.0%} of the computing time was priced by measurements of {', '.join(foreign)}, "
            f"scaled to the data sheet of {gpu}."
        )
    beyond = [one for one in found["beyond"] if one["octaves"] > 0 or one["origin"] == "formula"]
    share = sum(one["share"] for one in beyond)
    if share >= BEYOND_STANDS_OUT:
        named = "; ".join(_told(one) for one in beyond[:_NAMED])
        yield f"{share:.0%} of the computing time lies beyond what was measured: {named}."


def _library_note(trace: Trace, found: dict[str, Any]) -> Iterator[str]:
    """How far a library that was asked for could be taken."""
    asked = trace.facts.get("kernels") or _ANY
    share = sum(one["share"] for one in found["bases"] if one["basis"].split()[2:] == [asked])
    if asked != _ANY and share < 1.0 - 1e-9:
        yield (
            f"deployment.kernels = {asked}: {share:.0%} of the computing time is priced by its kernels, the "
            "rest by those of others, for want of measurements."
        )


def _told(one: dict[str, Any]) -> str:
    how = "by formula" if one["origin"] == "formula" else f"up to {one['octaves']:.1f} octaves outside"
    return f"{one['operator']} ({one['kernel']}, {one['share']:.0%}, {how})"
