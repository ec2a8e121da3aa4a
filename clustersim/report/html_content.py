"""What a report shows, gathered before a word of it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.analysis.critical_path import Path
from clustersim.analysis.expert_map import ExpertMap
from clustersim.analysis.over_time import GpuUse, LinkUse
from clustersim.analysis.what_if import Bound
from clustersim.report.html_parts import Missing


@dataclass(frozen=True, slots=True)
class Bounds:
    """What could make steps shorter.

    bounds       as `what_if.bounds` gives them
    unexplained  s by which recorded times are off from what the graph says, at most
    """

    bounds: Sequence[Bound]
    unexplained: float


@dataclass(frozen=True, slots=True)
class OneStep:
    """The step whose timeline is drawn.

    path     its critical path
    phase    prefill or decode
    chosen   how it was chosen, a clause
    ranks    whose work is drawn, with the names of their GPUs, top to bottom
    pieces   as `slices.slice_of` gives them, of these ranks while the step ran
    merged   whether operators of a layer that follow each other were put together
    """

    path: Path
    phase: str
    chosen: str
    ranks: Mapping[int, str]
    pieces: Sequence[Mapping[str, Any]]
    merged: bool


@dataclass(frozen=True, slots=True)
class Load:
    """GPUs over time.

    uses   what was looked at ("whole run", "step 7") → shares; rows are `rows`
    rows   label of every row: a rank, or several with their mean
    ranks  how many ranks a row stands for
    ends   (row behind which a stage ends, its name), in order
    """

    uses: Mapping[str, GpuUse]
    rows: Sequence[str]
    ranks: int
    ends: Sequence[tuple[float, str]]


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """A result as its report shows it; what the result does not hold is Missing.

    name, folder   of the scenario and of the result folder
    about          the scenario's description
    gpu            name of the GPU's model
    summary        content of summary.json
    scenario       resolved, TOML
    samples        as `latency.samples` gives them
    waits          phase → s that tokens stood in queues, and their numbers
    experts        load and wait by layer and expert, and `expert_queues.copies`
    shares         of critical paths by cause, as `critical_path.shares` gives them
    stragglers     as `stragglers.stragglers` gives them
    prices         as `prices.by_operator` gives them
    faults         rows of that table: kind, place, start, end, factor
    outages        rows: link, start, end, bandwidth, moved, avoided, stranded
    rebalances     rows of that table
    placements     s when each token batch began, its imbalance, and what it would have been at the first
                   places: three float64[T], or None
    """

    name: str
    folder: str
    about: str
    gpu: str
    summary: Mapping[str, Any]
    scenario: str
    samples: Mapping[str, np.ndarray]
    shares: Mapping[str, Any] | Missing
    bounds: Bounds | Missing
    step: OneStep | Missing
    load: Load | Missing
    links: LinkUse | Missing
    waits: Mapping[str, tuple[np.ndarray, np.ndarray]]
    experts: tuple[ExpertMap, Sequence[Mapping[str, Any]]] | Missing
    stragglers: Sequence[Mapping[str, Any]]
    prices: Sequence[Mapping[str, Any]]
    faults: Sequence[Mapping[str, Any]]
    outages: Sequence[Mapping[str, Any]]
    rebalances: Sequence[Mapping[str, Any]]
    placements: tuple[np.ndarray, np.ndarray, np.ndarray] | None
