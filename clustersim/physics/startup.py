"""What an exchange costs beside path latency and link bandwidth, and which algorithm a library takes.

One time model serves the simulation, the fit and `auto`:

    launch + sum over rounds of (path latency + step) + wire * bytes over the busiest port / bandwidth

Closed forms of its three parts stand here for every algorithm; `startup` turns them into what the
simulation adds to a collective's rounds. A reachable share of bandwidth is charged as bytes on the
wire (`wire` > 1), so that links keep the bandwidth of their data sheet and utilization its meaning.

Sizes are what `plan.collectives` calls them, per member: the vector of an all-reduce, and the total
over all members for all-gather, reduce-scatter (n parts) and all-to-all (a member's n parts).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from clustersim.errors import pick
from clustersim.spec.hardware import Server
from clustersim.spec.library import IN_SWITCH, FabricCosts, KernelCosts, LibraryCosts

#: A number, or an array of one per row where many rows are worked out at once.
Numbers: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Shape:
    """A group on a machine, as far as start-up costs and the choice of an algorithm depend on it.

    members            ranks in the group, >= 2
    domains            NVLink domains they spread over, evenly
    nvlink_bandwidth   bytes/s of a GPU, one way, as on the data sheet
    nvlink_latency     s from GPU to GPU of a domain
    network_bandwidth  bytes/s of a member's share of its domain's cards, one way, as on the data sheet
    network_latency    s from GPU to GPU of the two domains farthest apart
    in_switch          1 where the switches reduce and multicast (NVLS), else 0
    """

    members: Numbers
    domains: Numbers
    nvlink_bandwidth: Numbers
    nvlink_latency: Numbers
    network_bandwidth: Numbers
    network_latency: Numbers
    in_switch: Numbers = 0

    @property
    def per_domain(self) -> Numbers:
        """Members in a domain."""
        return self.members / self.domains

    @property
    def crosses(self) -> Numbers:
        """Whether the group spreads over several domains."""
        return self.domains > 1


def shape_of(
    server: Server, architecture: str, members: int, domains: int, network_latency: float | None = None
) -> Shape:
    """The shape of a group on equal servers.

    architecture     a name of spec.library.ARCHITECTURES
    members          ranks in the group; domains: NVLink domains they spread over
    network_latency  s of the longest path between two members of different domains; by default that
                     through one leaf
    """
    card = min(server.nics * server.nic_bandwidth / server.gpus, server.pcie_bandwidth)
    latency = server.nic_latency if network_latency is None else network_latency
    summing = int(architecture in IN_SWITCH)
    return Shape(members, domains, server.nvlink_bandwidth, server.nvlink_latency, card, latency, summing)


@dataclass(frozen=True, slots=True)
class Costs:
    """Fitted parameters that hold for a group: of its GPUs, its network, and its custom kernels."""

    library: LibraryCosts
    fabric: FabricCosts
    kernels: KernelCosts | None = None


@dataclass(frozen=True, slots=True)
class Startup:
    """What the simulation adds to a collective's rounds.

    launch    s before the first byte of the first round
    step      s added to every round and each of its repeats beside the path's latency. Negative where
              only some hops of a round cross the network: no flow then waits less than 0
    wire      bytes on the wire per byte of payload, >= 1
    latency   s all rounds wait in all, path latencies included: what `step` was worked out from
    transfer  s the bytes take alone: what `wire` was worked out from
    protocol  LL, LL128 or Simple; "" where there is no choice

    `step` and `wire` hold for rounds and busiest ports as the closed forms count them. Who has the rounds
    on links can work them out anew: wire = transfer / (most seconds a link carries bytes), at least 1.
    """

    launch: float
    step: float
    wire: float
    latency: float
    transfer: float
    protocol: str = ""

    @property
    def seconds(self) -> float:
        """s the whole exchange takes alone."""
        return self.launch + self.latency + self.transfer


@dataclass(frozen=True, slots=True)
class Parts:
    """The three parts of an exchange's time, s, and what its busiest port needs at the data sheet's rate."""

    launch: Numbers
    latency: Numbers
    wire: Numbers
    port: Numbers

    @property
    def seconds(self) -> Numbers:
        """All together."""
        return self.launch + self.latency + self.wire


#: (costs, kind, shape, size, protocol) → parts; inf where the algorithm cannot be used.
Form: TypeAlias = Callable[[Costs, str, Shape, Numbers, str], Parts]

_PROTOCOLS = ("LL", "LL128", "Simple")
#: What a tree reaches of a ring's bandwidth: tree_bw_factor of NVIDIA/nccl@5067397c (v2.30.7)
#: src/graph/tuning.cc.
_TREE_REACH = 0.92


def _rounds_of_a_ring(kind: str, members: Numbers) -> Numbers:
    return (2 if kind == "all_reduce" else 1) * (members - 1)


def _step(costs: Costs, protocol: str) -> tuple[float, float]:
    """s per hop beside the path's latency, over NVLink and over the network."""
    library, fabric = costs.library, costs.fabric
    return {
        "LL": (library.step_ll, fabric.step_ll),
        "LL128": (library.step_ll128, fabric.step_ll),
        "Simple": (library.step_simple, fabric.step_ll + fabric.step_simple),
    }[protocol]


def _launch(library: LibraryCosts, protocol: str) -> float:
    start = {"LL": 0.0, "LL128": library.start_ll128, "Simple": library.start_simple}
    return library.launch + start[protocol]


def _reach(library: LibraryCosts, protocol: str) -> float:
    """Share of NVLink's bandwidth that a ring reaches."""
    return {"LL": library.reach_ll, "LL128": library.reach_ll128, "Simple": library.reach_simple}[protocol]


def _over_network(costs: Costs, shape: Shape, network: Numbers, protocol: str) -> Numbers:
    """s that bytes take through a member's share of the cards; 0 inside a domain."""
    fabric = costs.fabric
    rate = shape.network_bandwidth * fabric.reach
    if protocol == "LL":
        rate = np.minimum(fabric.rate_ll, rate)
    # Between domains NCCL goes from LL straight to Simple in all that was measured: no LL128 there.
    seconds = np.inf if protocol == "LL128" else network / rate
    return np.where(shape.crosses, seconds, 0.0)


def _filling(library: LibraryCosts, size: Numbers, protocol: str) -> Numbers:
    """How much longer than its bytes a pipeline of chunks takes, as it is not full all the time."""
    return 1.0 + np.sqrt(library.chunk / size) if protocol == "Simple" else 1.0


def _parts(
    costs: Costs, shape: Shape, size: Numbers, protocol: str, launch: Numbers, latency: Numbers,
    nvlink: tuple[Numbers, Numbers, Numbers], network: Numbers,
) -> Parts:  # fmt: skip
    """nvlink   bytes through a GPU's port, bytes it is busy beside, share of bandwidth it reaches
    network  bytes through a member's share of the cards
    """
    sent, own, reach = nvlink
    inside = shape.per_domain > 1
    over_nvlink = np.where(inside, (sent + own) / (shape.nvlink_bandwidth * reach), 0.0)
    over_network = _over_network(costs, shape, network, protocol)
    wire = np.maximum(over_nvlink * _filling(costs.library, size, protocol), over_network)
    port = np.maximum(
        np.where(inside, sent / shape.nvlink_bandwidth, 0.0),
        np.where(shape.crosses, network / shape.network_bandwidth, 0.0),
    )
    return Parts(launch, latency, wire, port)


def ring(costs: Costs, kind: str, shape: Shape, size: Numbers, protocol: str) -> Parts:
    """Shards go round all members; over several domains as many rings as a domain has members, so
    that every card carries its part.

    Going once round, the slowest shard crosses from every domain to the next.

    Source   rounds and hops over the network: NVIDIA/nccl@5067397c (v2.30.7) src/graph/tuning.cc
    """
    library, rounds = costs.library, _rounds_of_a_ring(kind, shape.members)
    crossing = (2 if kind == "all_reduce" else 1) * np.where(shape.crosses, shape.domains, 0)
    crossing = np.minimum(crossing, rounds)
    nvlink_step, network_step = _step(costs, protocol)
    latency = (rounds - crossing) * (shape.nvlink_latency + nvlink_step)
    latency = latency + crossing * (shape.network_latency + network_step)
    shard = size / shape.members
    own = {"LL": 0.0, "LL128": library.own_ll128, "Simple": library.own_simple}[protocol]
    return _parts(
        costs, shape, size, protocol, _launch(library, protocol), latency,
        (rounds * shard, own * shard, _reach(library, protocol)), rounds * shard / shape.per_domain,
    )  # fmt: skip


def tree(costs: Costs, kind: str, shape: Shape, size: Numbers, protocol: str) -> Parts:
    """A chain in every domain and two binary trees over the domains, each for half of the bytes.

    Source   Sanders, Speck, Träff, Parallel Computing 35(12), 2009; NCCL's chain within a node:
             NVIDIA/nccl@5067397c (v2.30.7) src/graph/tuning.cc
    """
    library = costs.library
    nvlink_step, network_step = _step(costs, protocol)
    hops = (shape.per_domain - 1) * (shape.nvlink_latency + nvlink_step)
    deep = np.ceil(np.log2(np.maximum(shape.domains, 1)))
    latency = 2 * (hops + deep * (shape.network_latency + network_step))
    reach = {
        "LL": library.reach_ll,
        "LL128": library.reach_ll128,
        "Simple": library.reach_simple * _TREE_REACH,
    }[protocol]
    # In the middle of a chain all bytes go out twice: as sums up, as results down.
    return _parts(
        costs, shape, size, protocol, _launch(library, protocol), latency,
        (2 * size, 0.0, reach), _between_domains(shape, size),
    )  # fmt: skip


def in_switch(costs: Costs, kind: str, shape: Shape, size: Numbers, protocol: str) -> Parts:
    """NVSwitch sums what the members of a domain hold and sends the sum to all of them (NVLS);
    between domains a tree.

    A port carries its member's vector once, and the member's part of the sums once more. Every
    member is the head of one part, and the heads begin one after the other.
    """
    library = costs.library
    deep = np.ceil(np.log2(np.maximum(shape.domains, 1)))
    latency = 2 * shape.nvlink_latency
    latency = latency + 2 * deep * (shape.network_latency + _step(costs, "Simple")[1])
    reach = library.switch_reach * np.where(shape.crosses, _TREE_REACH, 1.0)
    parts = _parts(
        costs, shape, size, "Simple", library.launch + shape.per_domain * library.switch_head, latency,
        (size * (1 + 1 / shape.per_domain), 0.0, reach), _between_domains(shape, size),
    )  # fmt: skip
    usable = (np.asarray(shape.in_switch) > 0) & (shape.per_domain > 2)
    return Parts(np.where(usable, parts.launch, np.inf), parts.latency, parts.wire, parts.port)


def _between_domains(shape: Shape, size: Numbers) -> Numbers:
    """Bytes through a member's cards: two domains swap halves; an inner node of one of several
    domains sends up once and down twice in one of the trees, a leaf up once in the other."""
    return np.where(shape.domains > 2, 2.0, 1.0) * size / shape.per_domain


def pairwise(costs: Costs, kind: str, shape: Shape, size: Numbers, protocol: str) -> Parts:
    """Everybody sends straight to everybody, all at once; point to point: one part to one peer."""
    library, fabric = costs.library, costs.fabric
    members = 2 if kind == "point_to_point" else shape.members
    part = size if kind == "point_to_point" else size / shape.members
    far = np.where(shape.crosses, 1 if kind == "point_to_point" else members - shape.per_domain, 0)
    near = members - 1 - far
    simple = protocol == "Simple"
    launch = library.pair_launch + (library.pair_simple if simple else 0.0)
    launch = launch + np.maximum(near - 1, 0) * library.pair_peer + np.maximum(far - 1, 0) * fabric.pair_peer
    step = _step(costs, protocol)[1]
    latency = np.where(shape.crosses, shape.network_latency + step, shape.nvlink_latency)
    own = 0.0 if kind == "point_to_point" else library.pair_own
    if simple:
        # A single message has all channels to itself, and keeps them full.
        filled = np.inf if kind == "point_to_point" else size
        return _parts(
            costs, shape, filled, protocol, launch, latency,
            (near * part, own * part, library.pair_reach), far * part,
        )  # fmt: skip
    parts = _parts(
        costs, shape, size, protocol, launch, latency, (near * part, 0.0, library.reach_ll), far * part
    )
    wire = np.maximum(parts.wire, part / library.pair_rate)
    return Parts(parts.launch, parts.latency, wire, parts.port)


def one_shot(costs: Costs, kind: str, shape: Shape, size: Numbers, protocol: str) -> Parts:
    """A custom kernel: everybody reads everybody's vector and sums it."""
    kernels = costs.kernels
    assert kernels is not None
    bytes_in = (shape.members - 1) * size
    return _kernel(shape, kernels.launch, kernels.peer, kernels.reach_one, bytes_in)


def two_shot(costs: Costs, kind: str, shape: Shape, size: Numbers, protocol: str) -> Parts:
    """A custom kernel: everybody sums its part of all vectors, meets the others, and reads theirs."""
    kernels = costs.kernels
    assert kernels is not None
    bytes_in = 2 * (shape.members - 1) * size / shape.members
    return _kernel(shape, kernels.launch + kernels.barrier, kernels.peer, kernels.reach_two, bytes_in)


def _kernel(shape: Shape, launch: float, peer: float, reach: float, bytes_in: Numbers) -> Parts:
    inside = np.where(shape.crosses, np.inf, launch)
    return Parts(
        inside + (shape.members - 1) * peer,
        shape.nvlink_latency,
        bytes_in / (shape.nvlink_bandwidth * reach),
        bytes_in / shape.nvlink_bandwidth,
    )


def hierarchical(costs: Costs, kind: str, shape: Shape, size: Numbers, protocol: str) -> Parts:
    """Straight to the members of the domain, then along the rails, one phase after the other; an
    all-reduce comes back the same way."""
    inside = replace(shape, members=shape.per_domain, domains=1)
    rails = replace(shape, members=shape.domains, nvlink_bandwidth=np.inf)
    share = size / shape.per_domain
    if kind == "all_reduce":
        across = ring(costs, kind, rails, share, protocol)
        within = pairwise(costs, kind, inside, size, _either(protocol))
        return _one_after_another(within, across, within)
    across = pairwise(costs, kind, rails, share, _either(protocol))
    return _one_after_another(across, pairwise(costs, kind, inside, size, _either(protocol)))


def _either(protocol: str) -> str:
    # Sends to peers know no LL128.
    return "Simple" if protocol == "Simple" else "LL"


def _one_after_another(*phases: Parts) -> Parts:
    """One launch for all phases: they are one kernel."""
    first, *others = phases
    for phase in others:
        first = Parts(
            np.maximum(first.launch, phase.launch), first.latency + phase.latency,
            first.wire + phase.wire, first.port + phase.port,
        )  # fmt: skip
    return first


def chain(costs: Costs, kind: str, shape: Shape, size: Numbers, protocol: str) -> Parts:
    """A broadcast handed on from neighbour to neighbour, piece by piece."""
    nvlink_step, network_step = _step(costs, protocol)
    crossing = shape.domains - 1
    latency = (shape.members - 1 - crossing) * (shape.nvlink_latency + nvlink_step)
    latency = latency + crossing * (shape.network_latency + network_step)
    reach = _reach(costs.library, protocol)
    launch = _launch(costs.library, protocol)
    return _parts(costs, shape, size, protocol, launch, latency, (size, 0.0, reach), size / shape.per_domain)


def binary_tree(costs: Costs, kind: str, shape: Shape, size: Numbers, protocol: str) -> Parts:
    """A broadcast down a binary tree, piece by piece: an inner member sends everything twice."""
    nvlink_step, network_step = _step(costs, protocol)
    deep, far = (np.ceil(np.log2(count)) for count in (shape.members, shape.domains))
    latency = (deep - far) * (shape.nvlink_latency + nvlink_step)
    latency = latency + far * (shape.network_latency + network_step)
    reach = _reach(costs.library, protocol) * _TREE_REACH
    launch = _launch(costs.library, protocol)
    return _parts(costs, shape, size, protocol, launch, latency, (2 * size, 0.0, reach), 2 * size)


def from_one(costs: Costs, kind: str, shape: Shape, size: Numbers, protocol: str) -> Parts:
    """A broadcast in which the first member sends everything to everybody."""
    return pairwise(costs, kind, shape, size * shape.members, protocol)


@dataclass(frozen=True, slots=True)
class Way:
    """One algorithm.

    form       its closed form
    protocols  those a library may take for it, the quickest is taken
    auto       whether NCCL's tuner has it, so that `auto` may take it
    """

    form: Form
    protocols: tuple[str, ...] = _PROTOCOLS
    auto: bool = True


_SENDS = ("LL", "Simple")

#: Kind of exchange → algorithm → way.
WAYS: dict[str, dict[str, Way]] = {
    "all_reduce": {
        "ring": Way(ring),
        "double_binary_tree": Way(tree),
        "in_switch": Way(in_switch, ("Simple",)),
        "hierarchical": Way(hierarchical, auto=False),
        "one_shot": Way(one_shot, ("",), auto=False),
        "two_shot": Way(two_shot, ("",), auto=False),
    },
    "all_gather": {
        "ring": Way(ring),
        "direct": Way(pairwise, _SENDS, auto=False),
        "hierarchical": Way(hierarchical, _SENDS, auto=False),
    },
    "reduce_scatter": {
        "ring": Way(ring),
        "direct": Way(pairwise, _SENDS, auto=False),
        "hierarchical": Way(hierarchical, _SENDS, auto=False),
    },
    "broadcast": {
        "ring": Way(chain),
        "binary_tree": Way(binary_tree, auto=False),
        "direct": Way(from_one, _SENDS, auto=False),
    },
    "all_to_all": {"pairwise": Way(pairwise, _SENDS)},
    "point_to_point": {"direct": Way(pairwise, _SENDS)},
}


def estimate(
    costs: Costs, kind: str, algorithm: str, shape: Shape, size: Numbers
) -> tuple[Parts, np.ndarray]:
    """The parts of an exchange's time with the quickest protocol, and which that is.

    Returns  parts; int[...] position of the protocol among those of the way
    Raises   ClustersimError for an algorithm without a closed form
    """
    way = pick(WAYS[kind], algorithm, f"start-up cost of {kind}")
    return _quickest([way.form(costs, kind, shape, size, protocol) for protocol in way.protocols])


def quickest(
    costs: Costs, kind: str, shape: Shape, size: Numbers, among: Collection[str] | None = None
) -> tuple[Parts, np.ndarray, list[str]]:
    """What `auto` takes: parts, int[...] position of the algorithm, and the algorithms' names."""
    names = [name for name, way in WAYS[kind].items() if way.auto and (among is None or name in among)]
    return (*_quickest([estimate(costs, kind, name, shape, size)[0] for name in names]), names)


def _quickest(found: list[Parts]) -> tuple[Parts, np.ndarray]:
    best = np.argmin(np.stack(np.broadcast_arrays(*(parts.seconds for parts in found))), axis=0)
    if best.ndim == 0:
        return found[int(best)], best

    def of(name: str) -> Numbers:
        return np.choose(best, [getattr(parts, name) for parts in found])

    return Parts(of("launch"), of("latency"), of("wire"), of("port")), best


def choose(costs: Costs, kind: str, shape: Shape, size: float, among: Collection[str] | None = None) -> str:
    """The algorithm that `auto` takes: the quickest by the closed form, as NCCL's own tuner has it.

    among  algorithms that may be taken; by default all that NCCL has
    """
    _, best, names = quickest(costs, kind, shape, size, among)
    return names[int(best)]


def startup(
    costs: Costs, kind: str, algorithm: str, shape: Shape, size: float, rounds: int | None = None
) -> Startup:
    """What the simulation adds to the rounds of one exchange.

    size    bytes, see the head of this module
    rounds  how many rounds, repeats counted, the collective has; by default a ring's, or one
    """
    parts, best = estimate(costs, kind, algorithm, shape, size)
    if rounds is None:
        rounds = int(_rounds_of_a_ring(kind, shape.members)) if algorithm == "ring" else 1
    path = shape.network_latency if shape.crosses else shape.nvlink_latency
    protocol = WAYS[kind][algorithm].protocols[int(best)]
    wire, port = max(float(parts.wire) / float(parts.port), 1.0), float(parts.port)
    most = _on_wire(costs, shape, protocol)
    waiting = (wire - most) * port if most < wire < np.inf else 0.0
    latency = float(parts.latency) + waiting
    return Startup(
        launch=float(parts.launch),
        step=latency / rounds - path,
        wire=min(wire, most) if waiting else wire,
        latency=latency,
        transfer=float(parts.wire) - waiting,
        protocol=protocol,
    )


def _on_wire(costs: Costs, shape: Shape, protocol: str) -> float:
    """The most bytes on the wire that a byte of payload can be; what takes longer than these waits.

    LL sends four bytes of flag with every four, LL128 eight with every 120. They are slow because each
    of their steps waits for flags, not because links are full: what others send meanwhile goes on.
    Source  NVIDIA/nccl@5067397c (v2.30.7) src/include/device.h: ncclLLFifoLine, NCCL_LL128_DATAELEMS
    """
    if protocol == "Simple":
        return 1 / min(costs.library.reach_simple, costs.fabric.reach if shape.crosses else 1.0)
    return {"LL": 2.0, "LL128": 128 / 120}.get(protocol, np.inf)
