"""What goes wrong and when: GPUs that are slow, throttle or differ; links that are slow, down, or flap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import merge
from itertools import combinations, count, groupby
from math import inf, prod

import numpy as np

from clustersim.errors import ClustersimError, nearest
from clustersim.plan.topology import Links
from clustersim.seeds import stream
from clustersim.spec.workload import Fault

#: (when, position of the fault in the scenario, from then on so many times slower; inf: down)
Switch = tuple[float, int, float]


class Pace:
    """How many times as long the operators of one GPU take, asked at times that never go back.

    changes  (s, factor from then on) at ascending times, perhaps endless
    """

    __slots__ = ("_changes", "_due", "_factor", "_next")

    def __init__(self, changes: Iterator[tuple[float, float]]) -> None:
        self._changes = changes
        self._factor = 1.0
        self._due, self._next = next(changes, (inf, 1.0))

    def at(self, now: float) -> float:
        """The factor of an operator that begins now."""
        while self._due <= now:
            self._factor = self._next
            self._due, self._next = next(self._changes, (inf, self._next))
        return self._factor


def paces(faults: Sequence[Fault], gpus: int, hottest: int, seed: int) -> list[Pace | None]:
    """Per rank how slow its GPU is; None where no fault befalls it.

    hottest  the rank that faults of the hottest GPU befall
    """
    spreads = {i: spread_factors(f, i, gpus, seed) for i, f in enumerate(faults) if f.kind == "spread_gpus"}
    found: list[Pace | None] = []
    for rank in range(gpus):
        mine = [i for i, fault in enumerate(faults) if _befalls(fault, rank, hottest)]
        plans = [switches(faults[i], i, seed, rank) for i in mine if factor_of(faults[i]) > 1]
        plans += [_steady(faults[i], i, float(factors[rank])) for i, factors in spreads.items()]
        found.append(Pace(_products(plans)) if plans else None)
    return found


def _befalls(fault: Fault, rank: int, hottest: int) -> bool:
    if fault.kind not in ("slow_gpu", "throttled_gpu"):
        return False
    return fault.gpu == "all" or (hottest if fault.gpu == "hottest" else fault.gpu) == rank


def spread_factors(fault: Fault, position: int, gpus: int, seed: int) -> np.ndarray:
    """How many times as long each GPU takes under spread_gpus, float64[gpus] with a mean of 1.

    The draws do not depend on the spread: a wider one makes the same GPUs slow, only more so.
    """
    assert fault.spread is not None
    factors = np.exp(fault.spread * stream(seed, "faults", position).standard_normal(gpus))
    return np.asarray(factors / factors.mean())


def _steady(fault: Fault, position: int, factor: float) -> Iterator[Switch]:
    yield fault.start, position, factor
    if end_of(fault) < inf:
        yield end_of(fault), position, 1.0


def _products(plans: Sequence[Iterator[Switch]]) -> Iterator[tuple[float, float]]:
    """Plans of several faults as one: the product of what they do, whenever one of them changes."""
    factors: dict[int, float] = {}
    for at, together in groupby(merge(*plans), key=lambda plan: plan[0]):
        factors.update({i: factor for _, i, factor in together})
        yield at, prod(factors.values())


def fastest(faults: Sequence[Fault], gpus: int, seed: int) -> float:
    """The least factor that any GPU may have at any time, 1 at most: no operator takes less than so many
    times what it was priced at."""
    spreads = [spread_factors(f, i, gpus, seed) for i, f in enumerate(faults) if f.kind == "spread_gpus"]
    # Spreads need not be at work at the same time.
    return prod(min(float(factors.min()), 1.0) for factors in spreads)


def end_of(fault: Fault) -> float:
    """When a fault is over, s; inf: never."""
    return inf if fault.end is None else fault.end


def factor_of(fault: Fault) -> float:
    """How many times slower it makes what it befalls; inf: down."""
    return inf if fault.factor is None else fault.factor


def link_faults(faults: Sequence[Fault], links: Links) -> dict[int, list[int]]:
    """Link number → its faults, by their position in the scenario.

    Raises   ClustersimError for a link or vertex that the topology does not have, and where two faults
             make a link flap at once: between them it might never come back
    """
    if all(fault.link is None for fault in faults):
        return {}
    number = {ends: k for k, ends in enumerate(zip(links.source, links.target, strict=True))}
    found: dict[int, list[int]] = {}
    for position, fault in enumerate(faults):
        if fault.link is not None:
            for link in _named(fault.link, number, f"faults.{position}.link"):
                found.setdefault(link, []).append(position)
    for link, mine in found.items():
        _check_one_flaps(f"{links.source[link]}->{links.target[link]}", faults, mine)
    return found


def _check_one_flaps(link: str, faults: Sequence[Fault], mine: Sequence[int]) -> None:
    downs = [i for i in mine if faults[i].kind == "flapping_link" and faults[i].factor is None]
    for i, other in combinations(downs, 2):
        if max(faults[i].start, faults[other].start) < min(end_of(faults[i]), end_of(faults[other])):
            raise ClustersimError(
                f"faults.{other}.link: {link} already flaps by faults.{i} at that time; give them times "
                "that do not overlap, or one of them a factor"
            )


def _named(name: str, number: Mapping[tuple[str, str], int], where: str) -> list[int]:
    """The links that "a->b", "a<->b" or "a" means, in the order of their numbers."""
    for arrow, backwards in (("<->", True), ("->", False)):
        a, found, b = name.partition(arrow)
        if found:
            ends = [(a, b), (b, a)] if backwards else [(a, b)]
            _check_ends(name, arrow, ends, number, where)
            return sorted(number[pair] for pair in ends)
    links = [k for ends, k in number.items() if name in ends]
    if not links:
        vertices = dict.fromkeys(end for ends in number for end in ends)
        example = " -> ".join(next(iter(number))).replace(" ", "")
        raise ClustersimError(
            f'{where}: the topology has no vertex "{name}"{nearest(name, vertices)}; a link is written '
            f'"source->target", such as "{example}", "a<->b" both ways, or by a vertex for all its links'
        )
    return links


def _check_ends(
    name: str,
    arrow: str,
    ends: Sequence[tuple[str, str]],
    number: Mapping[tuple[str, str], int],
    where: str,
) -> None:
    missing = [pair for pair in ends if pair not in number]
    if not missing:
        return
    vertices = dict.fromkeys(end for pair in number for end in pair)
    problem = f'{where}: the topology has no link "{name}"'
    unknown = [end for end in ends[0] if end not in vertices]
    if unknown:
        meant = [end if end in vertices else _nearest(end, vertices) for end in ends[0]]
        hint = nearest(name, [arrow.join(meant)]) if all(meant) else ""
        raise ClustersimError(f'{problem}{hint}; it has no vertex "{unknown[0]}"')
    if len(missing) < len(ends):
        a, b = next(pair for pair in ends if pair in number)
        raise ClustersimError(f'{problem}; it leads one way only, "{a}->{b}"')
    there = [b for a, b in number if a == ends[0][0]]
    more = f" and {len(there) - 4} more" if len(there) > 4 else ""
    shown = ", ".join(f'"{end}"' for end in there[:4])
    raise ClustersimError(f'{problem}; from "{ends[0][0]}" links lead to {shown or "nowhere"}{more}')


def _nearest(name: str, known: Mapping[str, object]) -> str:
    """The known name that is meant, or the empty string."""
    return nearest(name, known).removeprefix(' (did you mean "').removesuffix('"?)')


def capacities(
    nominal: float, faults: Sequence[Fault], mine: Sequence[int], seed: int
) -> Iterator[tuple[float, float]]:
    """When a link's bandwidth may change, and to what: (s, bytes/s), in order of time, perhaps endless.

    nominal  bytes/s without faults
    mine     positions in `faults` of those that befall the link; what befalls it at once multiplies
    Returns  changes at distinct times; the last of them holds for ever
    """
    # One that changes nothing, but for ever, would be asked for its first change for ever.
    mine = [i for i in mine if factor_of(faults[i]) > 1]
    factors = dict.fromkeys(mine, 1.0)
    last = {i: end_of(faults[i]) == inf and faults[i].kind == "down_link" for i in mine}
    plans = merge(*(switches(faults[i], i, seed) for i in mine))
    for at, together in groupby(plans, key=lambda plan: plan[0]):
        for _, i, factor in together:
            factors[i] = factor
        # Also where it stays what it was: what changes nothing for long must not be looked for for long.
        yield at, nominal / prod(factors.values())
        if any(last[i] and factors[i] == inf for i in mine):
            return


def switches(fault: Fault, position: int, seed: int, *whose: int) -> Iterator[Switch]:
    """When a fault sets in and lets go.

    position  of the fault in the scenario, and the name of its random stream, so that all links of one
              fault go down and come back together
    whose     further names of the stream: GPUs throttle each for itself
    """
    bad, end = factor_of(fault), end_of(fault)
    for start, over in _spells(fault, ("faults", position, *whose), seed):
        if start >= end:
            return
        yield start, position, bad
        if min(over, end) < inf:
            yield min(over, end), position, 1.0


def _spells(fault: Fault, names: Sequence[str | int], seed: int) -> Iterator[tuple[float, float]]:
    """From when to when it is slow or down, the fault's own end not counted."""
    if fault.period is None:
        yield fault.start, inf
    elif fault.timing == "regular":
        for turn in count():
            start = fault.start + turn * fault.period
            yield start, start + fault.duty * fault.period
    else:
        rng, start = stream(seed, *names), fault.start
        while True:
            over = start + rng.exponential(fault.duty * fault.period)
            yield start, over
            start = over + rng.exponential((1 - fault.duty) * fault.period)
