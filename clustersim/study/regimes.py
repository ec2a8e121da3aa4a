"""One question: in which regime is one deployment better than another?

Two properties of the load or the machine are varied together; both deployments run at every point with the
same random numbers, and the ratio of their throughputs says which one to buy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from clustersim.errors import ClustersimError, nearest, pick
from clustersim.spec.scenario import Scenario
from clustersim.spec.writing import scenario_hash
from clustersim.study.cases import Base, Bench, Outcome, variant
from clustersim.study.run import find
from clustersim.study.stress import Listener, Wish, prepared
from clustersim.study.stress_cases import Site, gini, placed, site_of, slow_gpu, slow_link
from clustersim.study.stress_schema import SCHEMA_VERSION

#: Where throughputs differ by less, neither deployment is called the better one.
_TIE = 0.02


@dataclass(frozen=True, slots=True)
class Axis:
    """What is varied.

    what       in words, with its unit
    values     (sites of both deployments) → what is tried
    overrides  for a value; of each deployment with its own site
    said       a value as a label
    """

    what: str
    values: Callable[[Sequence[Site]], Sequence[float]]
    overrides: Callable[[Site, float], Sequence[str]]
    said: Callable[[float], str] = lambda value: f"{value:g}"


def _sequences(sites: Sequence[Site]) -> list[float]:
    """Batches of doubling size that both deployments can deal out evenly, around those stated."""
    least = lcm(*(_least(site.scenario) for site in sites))
    stated = max(site.scenario.workload.sequences for site in sites)
    sizes: list[float] = [float(least)]
    while sizes[-1] * 2 <= 4 * stated:
        sizes.append(sizes[-1] * 2)
    return sizes[-_MOST:]


#: Values of an axis at most.
_MOST = 6


def _least(scenario: Scenario) -> int:
    """The fewest sequences that a deployment's shards and micro-batches share evenly."""
    chunked = scenario.workload.phase == "prefill"
    return scenario.deployment.data_parallel * (1 if chunked else scenario.workload.microbatches)


def _spare(site: Site, places: float) -> tuple[str, ...]:
    return placed(site.scenario, "eplb", round(places))


def _tokens_said(value: float) -> str:
    return f"{value:,.0f}"


#: Name after --map → what it is.
AXES: Mapping[str, Axis] = {
    "skew": Axis(
        "skew: Gini coefficient of the experts' popularity",
        lambda sites: (0.0, 0.1, 0.2, 0.3, 0.45, 0.6),
        lambda site, value: gini(value),
    ),
    "tokens": Axis(
        "sequences per batch; each makes a token per decode step",
        _sequences,
        lambda site, value: (f"workload.sequences={value:.0f}",),
        _tokens_said,
    ),
    "spare": Axis("spare places per rank, filled by EPLB", lambda sites: (0.0, 1.0, 2.0), _spare),
    "slow_gpu": Axis(
        "times that one GPU is slower",
        lambda sites: (1.0, 1.1, 1.25, 1.5, 2.0, 4.0),
        lambda site, value: (slow_gpu(site, value),),
    ),
    "slow_link": Axis(
        "what the bandwidth of one GPU's network card is divided by",
        lambda sites: (1.0, 2.0, 4.0, 8.0, 16.0),
        lambda site, value: (slow_link(site, value),),
    ),
}


@dataclass(frozen=True, slots=True)
class MapWish:
    """What is asked.

    a, b   the two deployments
    x, y   keys of AXES: what changes from column to column and from row to row
    steps  as in Wish
    """

    a: Base
    b: Base
    x: str
    y: str
    steps: int = 0


def parse_axes(text: str) -> tuple[str, str]:
    """Row and column of `--map ROW,COLUMN`.

    Raises   ClustersimError that says what is allowed
    """
    names = [name.strip().replace(" ", "_").replace("-", "_") for name in text.split(",")]
    if len(names) != 2:
        raise ClustersimError(f'--map: "{text}": two names with a comma between them are wanted; {_KNOWN}')
    for name in names:
        if name not in AXES:
            raise ClustersimError(f'--map: "{name}" is not known{nearest(name, AXES)}; {_KNOWN}')
    if names[0] == names[1] or {"slow_gpu", "slow_link"} == set(names):
        raise ClustersimError(f'--map: "{text}": these two cannot be varied together')
    return names[0], names[1]


_KNOWN = f"there are {', '.join(AXES)}"


def other_of(file: str, scenario: Scenario, against: Path | None) -> str:
    """The file of the deployment to compare with: the one named, or that of the scenario's claim.

    Raises   ClustersimError where there is none
    """
    if against is not None:
        return str(against)
    claimed = scenario.claimed.against if scenario.claimed else None
    if claimed is None:
        raise ClustersimError(
            f"{file}: a map compares two deployments; name the other with --against FILE, or what differs "
            "with --set-b KEY=VALUE"
        )
    beside = find(file).with_name(f"{claimed}.toml")
    if not beside.is_file():
        raise ClustersimError(
            f"{file}: claims to be against {claimed}, but there is no {beside}; use --against"
        )
    return str(Path(file).with_name(f"{claimed}.toml"))


def regime_map(wish: MapWish, bench: Bench, listener: Listener | None = None) -> dict[str, Any]:
    """The answer, as `stress_schema.SCHEMA` describes it.

    Raises   ScenarioError for mistakes of either file
    """
    listener = listener or Listener()
    bases, scenarios = zip(
        *(prepared(Wish(base, steps=wish.steps)) for base in (wish.a, wish.b)), strict=True
    )
    # Nothing on these axes depends on how long a step takes.
    sites = [site_of(scenario, 0, 0.0) for scenario in scenarios]
    axes = [pick(AXES, name, "--map") for name in (wish.x, wish.y)]
    columns, rows = (list(axis.values(sites)) for axis in axes)
    points = [(x, y) for y in rows for x in columns]
    cases = [
        variant(base, f"{which} {wish.x}={x:g} {wish.y}={y:g}", _laid(site, wish, x, y))
        for x, y in points
        for which, base, site in zip("ab", bases, sites, strict=True)
    ]
    outcomes = bench.all(cases, listener.tell)
    cells = [
        _cell(*point, *pair)
        for point, pair in zip(points, zip(outcomes[::2], outcomes[1::2], strict=True), strict=True)
    ]
    a, b = scenarios
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "question": "map",
        "name": a.name,
        "file": wish.a.file,
        "scenario_hash": scenario_hash(a),
        "seed": a.seed,
        "decode_steps": {"run": a.workload.decode_steps, "in_file": wish.a.scenario().workload.decode_steps},
        "map": {
            "x": _about(wish.x, axes[0], columns),
            "y": _about(wish.y, axes[1], rows),
            "a": _deployment(wish.a, a),
            "b": _deployment(wish.b, b),
            "cells": cells,
        },
    }
    found["notes"] = list(_notes(found["map"]))
    return found


def _laid(site: Site, wish: MapWish, x: float, y: float) -> tuple[str, ...]:
    return (*AXES[wish.x].overrides(site, x), *AXES[wish.y].overrides(site, y))


def _about(name: str, axis: Axis, values: Sequence[float]) -> dict[str, Any]:
    return {
        "name": name,
        "what": axis.what,
        "values": values,
        "labels": [axis.said(value) for value in values],
    }


def _deployment(base: Base, scenario: Scenario) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "file": base.file,
        "overrides": list(base.overrides),
        "what": f"{scenario.name} ({base.file})"
        + (f" with {', '.join(base.overrides)}" if base.overrides else " as it stands"),
        "scenario_hash": scenario_hash(scenario),
    }


def _cell(x: float, y: float, a: Outcome, b: Outcome) -> dict[str, Any]:
    rates = [one.figures and one.figures["tokens_per_second"] for one in (a, b)]
    ratio = rates[0] / rates[1] if rates[0] and rates[1] else None
    return {
        "x": x,
        "y": y,
        "a": _side(a),
        "b": _side(b),
        "ratio": ratio,
        "better": _better(ratio, bool(a.figures), bool(b.figures)),
    }


def _side(outcome: Outcome) -> dict[str, Any]:
    figures = outcome.figures
    return {
        "error": outcome.error,
        "tokens_per_second": figures and figures["tokens_per_second"],
        "p99_step": figures and figures["latency"]["step"]["p99"],
        "imbalance": figures and figures["imbalance"] and figures["imbalance"]["mean"],
    }


def _better(ratio: float | None, a_ran: bool, b_ran: bool) -> str:
    """a, b, neither (a tie) or unknown; who runs alone is better."""
    if ratio is None:
        return "a" if a_ran and not b_ran else "b" if b_ran and not a_ran else "unknown"
    return "neither" if abs(ratio - 1) <= _TIE else "a" if ratio > 1 else "b"


def _notes(found: Mapping[str, Any]) -> list[str]:
    cells = found["cells"]
    told = []
    for which in "ab":
        won = [cell for cell in cells if cell["better"] == which]
        ratios = [cell["ratio"] ** (1 if which == "a" else -1) for cell in won if cell["ratio"]]
        most = f" (by {max(ratios):.2f} x at most)" if ratios else ""
        told.append(f"{which.upper()} is better at {len(won)}{most}")
    equal = sum(cell["better"] == "neither" for cell in cells)
    told.append(f"they are equal to within {_TIE:.0%} at {equal}")
    unknown = sum(cell["better"] == "unknown" for cell in cells)
    if unknown:
        told.append(f"neither can be run at {unknown}")
    notes = [f"Of {len(cells)} points {', '.join(told[:-1])}, and {told[-1]}."]
    alone = [cell for cell in cells if cell["ratio"] is None]
    if alone:
        why = next(cell[which]["error"] for cell in alone for which in "ab" if cell[which]["error"])
        notes.append(f"At {len(alone)} points not both can be run; the first reason: {why}")
    return notes
