"""What was measured of the libraries on a machine, and what one exchange costs there by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite

import numpy as np

from clustersim.physics import expert_exchange
from clustersim.physics.expert_exchange import HEADER, LIBRARY, NORMAL_SMS, Tokens, row_bytes
from clustersim.physics.startup import WAYS, Costs, Shape, Startup, choose, startup
from clustersim.plan.stepgraph import Copies, Exchange
from clustersim.plan.topology import Topology
from clustersim.spec.costs import read_costs
from clustersim.spec.expert_costs import ExpertKernel
from clustersim.spec.library import fabric_costs, kernel_costs, library_costs
from clustersim.spec.model import FORMAT_BYTES

#: Whose one-shot and two-shot all-reduce: vLLM, SGLang and TensorRT-LLM have one each.
_KERNELS = "vllm"
#: Ways of an all-to-all among experts that have kernels of their own; pairwise is NCCL's.
_EXPERT_WAYS = ("low_latency", "hierarchical", "one_sided")
#: GPUs of an NVLink domain in the tables of small exchanges that are fitted (nccl_intranode).
_WIDEST = 8
#: One-sided kernels write into their peers' memory over NVLink; nobody has measured them across a network.
_NVLINK_ONLY = ("one_sided",)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What exchanges cost on the machine at hand.

    libraries  NCCL's on its GPUs and network, and custom kernels'
    experts    way of an all-to-all among experts → its dispatch, its combine
    sms        of each GPU
    """

    libraries: Costs
    experts: Mapping[str, tuple[ExpertKernel, ExpertKernel]]
    sms: int


def measured(topology: Topology, wanted: str) -> Measured | None:
    """What was measured on machines of this kind.

    wanted   network.startup of the scenario
    Returns  None where that is not wanted, or where nobody has measured such GPUs
    """
    gpu = topology.gpu
    if wanted == "none" or gpu.architecture is None:
        return None
    libraries = Costs(
        library_costs(gpu.architecture),
        fabric_costs(topology.fabric),
        kernel_costs(_KERNELS, gpu.architecture),
    )
    return Measured(libraries, _expert_kernels(gpu.architecture), gpu.sms)


def left_out(topology: Topology, wanted: str) -> str:
    """What is not known of what exchanges cost here, as a sentence; "" where nothing is missing.

    wanted   network.startup of the scenario
    """
    instead = "an exchange costs its GPU's launch latency, the latencies of paths, and bandwidth"
    if wanted == "none":
        return f'Libraries\' start-up costs are left out (network.startup = "none"): {instead}.'
    if topology.gpu.architecture is None:
        gpu = topology.gpu.name
        return f"No library's start-up costs are known on a {gpu} (no architecture given): {instead}."
    widest = int(np.bincount(topology.domain).max())
    if widest > _WIDEST:
        return (
            f"Small exchanges were measured among at most {_WIDEST} GPUs of an NVLink domain; here it has "
            f"{widest}, and what starting them costs is extrapolated."
        )
    return ""


def _expert_kernels(architecture: str) -> dict[str, tuple[ExpertKernel, ExpertKernel]]:
    # Nobody has measured them on Ampere: there they cost what they cost on Hopper.
    known = read_costs("expert_exchange", ExpertKernel)
    found = {}
    for way in _EXPERT_WAYS:
        newer = f"{LIBRARY[way]}_blackwell"
        name = newer if architecture == "blackwell" and f"{newer}_dispatch" in known else LIBRARY[way]
        found[way] = known[f"{name}_dispatch"], known[f"{name}_combine"]
    return found


def startup_of(
    costs: Measured, exchange: Exchange, algorithm: str, shape: Shape, size: float
) -> Startup | None:
    """What one group pays for an exchange beside its bytes; None where nobody knows that.

    size     bytes as in `physics.exchanges.nominal_size`
    """
    if size <= 0:
        return None
    if exchange.kind == "all_to_all" and algorithm in costs.experts:
        if exchange.copies is None:
            return None
        kernel = costs.experts[algorithm][exchange.back]
        return expert_exchange.startup(kernel, algorithm, shape, tokens_of(costs, exchange, algorithm, size))
    # A scattered hand-over is a send to one peer like any other; that it is shared shows in its size.
    name = "direct" if exchange.kind == "point_to_point" else algorithm
    found = startup(costs.libraries, exchange.kind, name, shape, size)
    # A closed form says inf where nobody uses the algorithm for such a group.
    return found if isfinite(found.seconds) else None


def tokens_of(costs: Measured, exchange: Exchange, way: str, size: float) -> Tokens:
    """What the members of an expert group exchange, as the kernels of a way see it.

    size     bytes that each member sends in the mean, its own part counted
    """
    copies = exchange.copies
    assert copies is not None
    payload = _payload(copies, exchange.back)
    row = row_bytes(copies.numbers, copies.sent_as(exchange.back))
    return Tokens(
        count=size / (payload * copies.top_k),
        payload=payload,
        row=row + HEADER if way == "low_latency" and not exchange.back else row,
        top_k=copies.top_k,
        experts=copies.experts,
        sms={"low_latency": costs.sms, "hierarchical": NORMAL_SMS}.get(way, 1),
    )


def chosen(costs: Measured, exchange: Exchange, shape: Shape, size: float, among: Collection[str]) -> str:
    """The algorithm that "auto" takes for a group: the quickest by its closed form.

    An all-to-all among experts may take any library's; tokens come back as they went.

    size     bytes as in `physics.exchanges.nominal_size`
    among    algorithms that the group can do
    """
    if exchange.kind == "all_to_all" and exchange.copies is not None:
        within = {name for name in among if name not in _NVLINK_ONLY or shape.domains == 1}
        seconds = {name: _there_and_back(costs, exchange, name, shape, size) for name in sorted(within)}
        return min(seconds, key=lambda name: seconds[name])
    known = [name for name in among if name in WAYS[exchange.kind]]
    return choose(costs.libraries, exchange.kind, shape, size, known)


def _there_and_back(costs: Measured, exchange: Exchange, name: str, shape: Shape, size: float) -> float:
    """Seconds of both directions, whichever of them the exchange is; inf where nobody knows them."""
    copies = exchange.copies
    assert copies is not None
    here, seconds = _payload(copies, exchange.back), 0.0
    for back in (False, True):
        part = startup_of(
            costs, replace(exchange, back=back), name, shape, size * _payload(copies, back) / here
        )
        seconds += inf if part is None else part.seconds
    return seconds


def _payload(copies: Copies, back: bool) -> float:
    return float(copies.numbers * FORMAT_BYTES[copies.sent_as(back)])
