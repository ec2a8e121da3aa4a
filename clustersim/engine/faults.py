"""What goes wrong and when: slow GPUs, slow and flapping links."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import merge
from math import prod

from clustersim.errors import ClustersimError, nearest
from clustersim.plan.topology import Links
from clustersim.spec.workload import Fault


def slowness_of(faults: Sequence[Fault], rank: int) -> list[tuple[float, float, float]]:
    """(start, end, factor) of every fault that slows this rank's GPU."""
    return [(f.start, f.end, f.factor) for f in faults if f.kind == "slow_gpu" and f.gpu == rank]


def link_faults(faults: Sequence[Fault], links: Links) -> dict[int, list[Fault]]:
    """Link number → its faults.

    Raises   ClustersimError for a link that the topology does not have
    """
    names = {f"{a}->{b}": k for k, (a, b) in enumerate(zip(links.source, links.target, strict=True))}
    found: dict[int, list[Fault]] = {}
    for i, fault in enumerate(faults):
        if fault.link is None:
            continue
        if fault.link not in names:
            raise ClustersimError(
                f'faults.{i}.link: the topology has no link "{fault.link}"{nearest(fault.link, names)}; '
                f'links are written "source->target", such as "{next(iter(names))}"'
            )
        found.setdefault(names[fault.link], []).append(fault)
    return found


def capacities(nominal: float, faults: Sequence[Fault]) -> Iterator[tuple[float, float]]:
    """When a link's bandwidth changes, and to what: (s, bytes/s), in order of time, perhaps endless."""
    factors = [1.0] * len(faults)
    for at, which, factor in merge(*(_switches(i, f) for i, f in enumerate(faults))):
        factors[which] = factor
        yield at, nominal / prod(factors)


def _switches(which: int, fault: Fault) -> Iterator[tuple[float, int, float]]:
    if fault.kind == "slow_link":
        yield fault.start, which, fault.factor
        yield fault.end, which, 1.0
        return
    turn = 0
    while fault.start + turn * fault.period < fault.end:
        at = fault.start + turn * fault.period
        yield at, which, fault.factor
        yield min(at + fault.period / 2, fault.end), which, 1.0
        turn += 1
