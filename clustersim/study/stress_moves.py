"""Where a case's load moves: experts placed once, and placed anew while it runs, with the bill of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clustersim.spec.deployment import BY_LOAD
from clustersim.study.cases import Base, Case, Outcome, variant
from clustersim.study.stress_cases import AS_STATED, Site, placed

#: How weights move: passes stop for them, or share the links with them.
_TRANSFERS = ("stop", "background")
_KEY = "deployment.experts.rebalance"
#: Plans in a run, where the file says nothing: as often as the suite's hot set moves on.
_PLANS = 4


@dataclass(frozen=True, slots=True)
class Move:
    """One comparison: the same case and placement, left alone and placed anew."""

    case: str
    placement: str
    transfer: str
    once: Case
    anew: Case


def moves_of(base: Base, site: Site, cases: Sequence[Case]) -> list[Move]:
    """What is compared: every case whose load moves, under the placements that go by load."""
    moving = [case for case in cases if case.scenario and case.scenario.gating.motion != "still"]
    found = []
    for case in moving:
        for name, lay in _placements(site).items():
            laid = (*case.overrides, *lay, f"{_KEY}.every=0")
            once = variant(base, f"{case.name} | {name}, placed once", laid)
            for transfer in _TRANSFERS:
                how = (f"{_KEY}.every={every(site)}", f"{_KEY}.window={_window(site)}")
                overrides = (*laid[:-1], *how, f"{_KEY}.transfer={transfer}")
                anew = variant(base, f"{case.name} | {name}, placed anew, {transfer}", overrides)
                found.append(Move(case.name, name, transfer, once, anew))
    return found


def _placements(site: Site) -> dict[str, tuple[str, ...]]:
    own = site.scenario.deployment.experts
    found: dict[str, tuple[str, ...]] = {AS_STATED: ()} if own.policy in BY_LOAD else {}
    if site.each > 1:
        # With one place per rank no placement is better than another.
        found["packed"] = placed(site.scenario, "packed")
    return found | {"packed + 1": placed(site.scenario, "packed", 1)}


def every(site: Site) -> int:
    """Steps from one planning to the next: the file's, if the run is long enough for it."""
    stated = site.scenario.deployment.experts.rebalance.every
    return stated if 0 < stated < site.steps else max(site.steps // _PLANS, 1)


def _window(site: Site) -> int:
    how = site.scenario.deployment.experts.rebalance
    return how.window if how.every else every(site)


def moving_table(
    site: Site, moves: Sequence[Move], outcomes: Sequence[Outcome], ratio: Callable[[Outcome], float | None]
) -> dict[str, Any] | None:
    """The comparisons as JSON values; None where no load moves.

    outcomes  of `once` and `anew` of each, in turn
    ratio     throughput of an outcome / that of the balanced case
    """
    if not moves:
        return None
    pairs = zip(outcomes[::2], outcomes[1::2], strict=True)
    return {
        "every": every(site),
        "window": _window(site),
        "steps": site.steps,
        "rows": [_row(move, *pair, ratio) for move, pair in zip(moves, pairs, strict=True)],
    }


def _row(
    move: Move, once: Outcome, anew: Outcome, ratio: Callable[[Outcome], float | None]
) -> dict[str, Any]:
    rates = [one.figures and one.figures["tokens_per_second"] for one in (once, anew)]
    return {
        "case": move.case,
        "placement": move.placement,
        "transfer": move.transfer,
        "overrides": list(move.anew.overrides),
        "error": once.error or anew.error,
        "once": _side(once, ratio),
        "anew": _side(anew, ratio),
        "gain": rates[1] / rates[0] - 1 if rates[0] and rates[1] else None,
        "bill": anew.figures and anew.figures["rebalancing"],
    }


def _side(outcome: Outcome, ratio: Callable[[Outcome], float | None]) -> Mapping[str, Any] | None:
    figures = outcome.figures
    if figures is None:
        return None
    token, load = figures["token"], figures["imbalance"]
    return {
        "against_balanced": ratio(outcome),
        "p99_token": token and token["p99"],
        "imbalance": load and load["mean"],
    }
