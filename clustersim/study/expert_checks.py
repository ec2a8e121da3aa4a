"""What the expert exchanges foretell: scale from less scale, one generation from another, file from file.

Every check fits anew with some rows left out and says how far the others are off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.study.expert_fit import KERNELS, costs_from, fit_cases, predict
from clustersim.study.expert_rows import READERS, Case, all_cases
from clustersim.study.prediction import Costs

#: |relative error| within which EP32 is to be foretold from EP8 and EP16.
SCALE_GOAL = 0.20


@dataclass(frozen=True, slots=True)
class Check:
    """Rows foretold by a fit that has not seen them.

    rows              how many; median, p90, most: of |relative error|
    ratio             median of predicted / measured
    goal              that `median` must keep within; None where the check informs only
    """

    name: str
    rows: int
    median: float
    p90: float
    most: float
    ratio: float
    goal: float | None = None

    @property
    def kept(self) -> bool:
        """Whether the goal, if there is one, is met."""
        return self.goal is None or self.median <= self.goal


def _check(name: str, cases: Sequence[Case], costs: Costs, goal: float | None = None) -> Check:
    errors = np.array([one.error for one in predict(cases, costs)])
    sizes = np.abs(errors)
    return Check(
        name,
        len(cases),
        float(np.median(sizes)),
        float(np.quantile(sizes, 0.9)),
        float(sizes.max()),
        float(1.0 + np.median(errors)),
        goal,
    )


def _library(*prefixes: str) -> Callable[[Case], bool]:
    return lambda case: case.group.rsplit("_", 1)[0] in prefixes


_DEEPEP = _library("deepep_low_latency")
_GARDEN = _library("pplx_garden_cx7", "pplx_garden_efa")


def scale_checks() -> list[Check]:
    """More ranks foretold from fewer."""
    cases = [case for case in all_cases() if not case.flagged]
    small = costs_from(fit_cases([case for case in cases if case.members <= 16]))
    usual = costs_from(fit_cases(cases))
    found = []
    for ranks, costs, source in ((32, small, "8 and 16"), (64, small, "8 and 16"), (64, usual, "8 to 32")):
        for name, chosen in (("DeepEP low latency", _DEEPEP), ("pplx-garden", _GARDEN)):
            those = [case for case in cases if case.members == ranks and chosen(case)]
            goal = SCALE_GOAL if ranks == 32 else None
            found.append(_check(f"{name}: {ranks} ranks from {source}", those, costs, goal))
    for name in ("ibgda", "ibrc"):
        those = [case for case in cases if case.members > 32 and _library(f"pplx_kernels_{name}")(case)]
        found.append(_check(f"pplx-kernels {name.upper()}: 64 and 128 ranks from 16 and 32", those, usual))
    return found


def generation_checks() -> list[Check]:
    """Blackwell foretold from Hopper: the shares and costs of the one with the bandwidth of the other."""
    cases = all_cases()
    blackwell = [case for case in cases if case.file == "deepep_low_latency_blackwell"]
    hopper = costs_from(fit_cases([case for case in cases if case.file != "deepep_low_latency_blackwell"]))
    return [
        _check(f"DeepEP low latency {kind}: Blackwell from Hopper, {ruled} rules", those, hopper)
        for kind in ("dispatch", "combine")
        for ruled in ("bandwidth", "latency")
        for those in [[case for case in blackwell if case.kind == kind and case.ruled == ruled]]
    ]


def flagged_checks() -> list[Check]:
    """Rows whose source is doubted: neither fitted nor judged, but how far off are they?"""
    costs = costs_from(fit_cases(all_cases()))
    flagged = [case for case in all_cases() if case.flagged]
    return [
        _check(f"{file}: rows marked as doubtful", [case for case in flagged if case.file == file], costs)
        for file in sorted({case.file for case in flagged})
    ]


@dataclass(frozen=True, slots=True)
class Influence:
    """What a file means to the others.

    file      left out of the fit
    own       median |relative error| of its rows when it is fitted
    foretold  the same when it is not
    touched   rows of other files whose predictions could move: their library is in `file`, too
    off       median |relative error| of these rows when `file` is fitted
    moved     median, most: |log| by which their predictions move when it is not
    """

    file: str
    own: float
    foretold: float
    touched: int
    off: float
    moved: float
    most: float

    @property
    def kept(self) -> bool:
        """Whether the others' predictions move less than they are off anyway."""
        return self.moved <= self.off


def influences() -> list[Influence]:
    """Leave one file out, for every file: only rows that could move are counted."""
    cases = [case for case in all_cases() if not case.flagged]
    whole = predict(cases, costs_from(fit_cases(cases)))
    found = []
    for file in READERS:
        left = predict(cases, costs_from(fit_cases([case for case in cases if case.file != file])))
        own = [k for k, case in enumerate(cases) if case.file == file]
        touched = {cases[k].group for k in own}
        touched |= {name for name, kernel in KERNELS.items() if kernel.like in touched}
        others = [k for k, case in enumerate(cases) if case.file != file and case.group in touched]
        moved = np.array([abs(np.log(left[k].predicted / whole[k].predicted)) for k in others] or [0.0])
        found.append(
            Influence(
                file,
                float(np.median([abs(whole[k].error) for k in own])),
                float(np.median([abs(left[k].error) for k in own])),
                len(others),
                float(np.median([abs(whole[k].error) for k in others] or [0.0])),
                float(np.median(moved)),
                float(moved.max()),
            )
        )
    return found


def checks() -> list[Check]:
    """All of them that foretell."""
    return [*scale_checks(), *generation_checks(), *flagged_checks()]
