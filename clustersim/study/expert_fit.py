"""The expert exchanges as a family: which parameters each library's kernels have, and their fit.

A parameter is there because the kernel's way of working has that cost, and is left out where no
row could tell it from another one. Only rows of up to 32 ranks are fitted; more ranks are foretold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from clustersim.physics.expert_exchange import seconds
from clustersim.spec.costs import from_values
from clustersim.spec.expert_costs import ExpertKernel
from clustersim.study.expert_rows import READERS, Case, latency_of, load_of
from clustersim.study.least_squares import Fitted, Parameter, fit
from clustersim.study.measured import Table
from clustersim.study.prediction import Costs, Family, Groups, Prediction, values

#: Weak: it only keeps a parameter near its start that hardly any row speaks about.
_PRIOR = 10.0
_ALL: dict[str, Parameter] = {
    "launch": Parameter(10e-6, 1e-6, 1e-3, "time", _PRIOR),
    "expert": Parameter(10e-9, 1e-10, 1e-6, "time", _PRIOR),
    "signal": Parameter(50e-9, 1e-9, 1e-5, "time", _PRIOR),
    "network": Parameter(30e-6, 1e-7, 1e-2, "time", _PRIOR),
    "target": Parameter(500e-9, 1e-9, 1e-5, "time", _PRIOR),
    "fill": Parameter(3e-10, 1e-12, 1e-8, "", _PRIOR),
    "token": Parameter(400e-9, 1e-10, 1e-5, "time", _PRIOR),
    "replica": Parameter(20e-9, 1e-10, 1e-5, "time", _PRIOR),
    "byte": Parameter(4e-11, 1e-13, 1e-8, "", _PRIOR),
    "relay": Parameter(2e-10, 1e-13, 1e-8, "", _PRIOR),
    "message": Parameter(200e-9, 1e-9, 1e-5, "time", _PRIOR),
    "nvlink": Parameter(0.6, 0.05, 1.0, "", _PRIOR),
    "nic": Parameter(0.92, 0.05, 1.0, "", _PRIOR),
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of one library.

    fitted  names of its parameters
    like    group whose values it takes for what is not fitted, and as starts for what is; "" for none
    shared  names of these, where it is like it in nothing else
    start   parameter → other start than usual
    """

    fitted: tuple[str, ...]
    like: str = ""
    shared: tuple[str, ...] = ()
    start: Mapping[str, float] = field(default_factory=dict)


_LOW_LATENCY = ("launch", "expert", "signal", "fill", "token", "byte", "nvlink", "nic")
_BLACKWELL = ("launch", "expert", "fill", "token", "byte", "nvlink")
_NORMAL = ("launch", "network", "target", "fill", "token", "byte", "relay", "nvlink")
_RACK = ("launch", "target", "fill", "token", "nvlink")
_WHOLE_GPU = {"token": 30e-9, "replica": 1e-9}

#: Group → kernel. A group comes after the one it is like.
KERNELS: dict[str, Kernel] = {
    "deepep_low_latency_dispatch": Kernel(_LOW_LATENCY, start={"token": 1.8e-6}),
    "deepep_low_latency_combine": Kernel(_LOW_LATENCY),
    "deepep_low_latency_blackwell_dispatch": Kernel(_BLACKWELL, "deepep_low_latency_dispatch"),
    "deepep_low_latency_blackwell_combine": Kernel(_BLACKWELL, "deepep_low_latency_combine"),
    # How much of a card's rate GPU-initiated writes reach does not depend on the kernel.
    "deepep_normal_dispatch": Kernel((*_NORMAL, "replica"), "deepep_low_latency_dispatch", ("nic",)),
    "deepep_normal_combine": Kernel(_NORMAL, "deepep_low_latency_combine", ("nic",)),
    "trtllm_one_sided_dispatch": Kernel(_RACK, start=_WHOLE_GPU),
    "trtllm_one_sided_combine": Kernel(_RACK, start=_WHOLE_GPU),
    "trtllm_two_sided_prepare": Kernel(("launch", "token"), start=_WHOLE_GPU),
    "trtllm_two_sided_dispatch": Kernel((*_RACK, "replica"), start=_WHOLE_GPU),
    "trtllm_two_sided_combine": Kernel((*_RACK, "replica"), start=_WHOLE_GPU),
    "trtllm_two_sided_combine_low_precision": Kernel(
        ("launch", "fill", "token", "replica"), start={"token": 130e-9, "replica": 3e-9}
    ),
    "pplx_garden_cx7_dispatch": Kernel(("launch", "network", "nvlink", "nic")),
    "pplx_garden_cx7_combine": Kernel(("launch", "network", "nvlink", "nic")),
    "pplx_garden_efa_dispatch": Kernel(("network", "nic"), "pplx_garden_cx7_dispatch"),
    "pplx_garden_efa_combine": Kernel(("network", "nic"), "pplx_garden_cx7_combine"),
    "pplx_kernels_nvlink_dispatch": Kernel(("launch", "token")),
    "pplx_kernels_nvlink_combine": Kernel(("launch", "token")),
    "pplx_kernels_ibgda_dispatch": Kernel(("launch", "nic")),
    "pplx_kernels_ibgda_combine": Kernel(("launch", "nic")),
    "pplx_kernels_ibrc_dispatch": Kernel(("launch", "signal", "nic")),
    "pplx_kernels_ibrc_combine": Kernel(("launch", "signal", "nic")),
    "nccl_padded_alltoall": Kernel(("launch", "network", "nvlink", "nic")),
    "uccl_normal_efa_dispatch": Kernel(("network", "message"), "deepep_normal_dispatch"),
    "uccl_normal_efa_combine": Kernel(("message",), "deepep_normal_combine"),
    "uccl_low_latency_efa_dispatch": Kernel(("message",), "deepep_low_latency_dispatch"),
    "uccl_low_latency_efa_combine": Kernel(("message",), "deepep_low_latency_combine"),
}


def expected(costs: ExpertKernel, cases: Sequence[Case]) -> np.ndarray:
    """float64[N] s that a kernel with these costs takes for each case."""
    times: np.ndarray = seconds(costs, load_of(cases), latency_of(cases))
    return times


def fit_cases(cases: Sequence[Case]) -> Groups:
    """Every kernel's parameters, from those of the cases that may be fitted."""
    by_group: dict[str, list[Case]] = {name: [] for name in KERNELS}
    for case in cases:
        if case.fitted:
            by_group[case.group].append(case)
    groups: dict[str, Mapping[str, Fitted]] = {}
    for name, kernel in KERNELS.items():
        groups[name] = _fit_kernel(kernel, by_group[name], groups.get(kernel.like, {}))
    return groups


def _fit_kernel(kernel: Kernel, cases: Sequence[Case], other: Mapping[str, Fitted]) -> Mapping[str, Fitted]:
    taken = {
        name: one
        for name, one in other.items()
        if (name in kernel.shared if kernel.shared else name not in kernel.fitted)
    }
    fixed = from_values({name: one.value for name, one in taken.items()}, ExpertKernel)
    load, latency = load_of(cases), latency_of(cases)

    def model(at: Mapping[str, float]) -> np.ndarray:
        times: np.ndarray = seconds(fixed.model_copy(update=at), load, latency)
        return times

    own = fit(
        _starts(kernel, {} if kernel.shared else other),
        model,
        np.array([case.measured for case in cases]),
        np.array([case.file for case in cases]),
    )
    return {**taken, **own}


def _starts(kernel: Kernel, other: Mapping[str, Fitted]) -> dict[str, Parameter]:
    known = from_values({name: one.value for name, one in other.items()}, ExpertKernel)
    starts = {}
    for name in kernel.fitted:
        start = getattr(known, name) if name in other else kernel.start.get(name, _ALL[name].start)
        starts[name] = replace(_ALL[name], start=start)
    return starts


def _fit(tables: Mapping[str, Table]) -> Groups:
    return fit_cases([case for name, table in tables.items() for case in READERS[name](table)])


def costs_from(groups: Groups) -> Costs:
    """Group → its kernel, as the model reads it."""
    return {name: from_values(group, ExpertKernel) for name, group in values(groups).items()}


def predict(cases: Sequence[Case], costs: Costs) -> list[Prediction]:
    """What the model says about each case, in their order."""
    times = np.empty(len(cases))
    groups = np.array([case.group for case in cases])
    for name in sorted(set(groups.tolist())):
        chosen = np.flatnonzero(groups == name).tolist()
        times[chosen] = expected(costs[name], [cases[place] for place in chosen])
    return [
        Prediction(
            file=case.file,
            row=case.row,
            kind=case.kind,
            what=case.what,
            gpus=case.members,
            servers=-(-case.members // case.domain),
            size=case.size,
            measured=case.measured,
            predicted=float(time),
            ruled=case.ruled,
            fitted=case.fitted,
            choice=case.group.removesuffix(f"_{case.kind}"),
        )
        for case, time in zip(cases, times, strict=True)
    ]


def _predictor(name: str, table: Table, costs: Costs) -> list[Prediction]:
    return predict([case for case in READERS[name](table) if not case.flagged], costs)


def _files() -> dict[str, Callable[[Table, Costs], list[Prediction]]]:
    return {name: partial(_predictor, name) for name in READERS}


EXPERT_EXCHANGE = Family(
    section="expert_exchange",
    files=_files(),
    fit=_fit,
    costs=costs_from,
    left_out={
        ("deepep_normal_h100", "64 ranks"): "marked suspect: far off the trend of 8 and 16 ranks; not judged",
        ("moe_a2a_published", "trust low"): "look like typing errors in the source; not judged",
        ("moe_a2a_published", "64 and more ranks"): "kept to be foretold",
        ("moe_a2a_published", "UCCL-EP normal combine at 16, 24"): "the source: far from the wire limit",
    },
)
