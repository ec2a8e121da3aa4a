"""The machine: GPUs, servers and how they are joined."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from clustersim.spec.quantities import (
    Bandwidth,
    Count,
    FlopRate,
    Fraction,
    Frequency,
    Power,
    Size,
    Time,
    Value,
    Whole,
)

#: What ib_write_lat of 8 bytes gains from within a network block to across blocks, s: 5.11 us - 2.795 us.
#: Source: OCI GB300 guide, medians of 8 HCAs.
UPLINK_LATENCY = 2.315e-6
#: An assumption where a file says nothing: uplinks have the rate of 400 Gb/s cards, bytes/s.
UPLINK_BANDWIDTH = 5e10


Architecture = Literal["ampere", "hopper", "blackwell"]
Fabric = Literal["infiniband", "ethernet"]


class Gpu(Value):
    """One accelerator as its data sheet describes it.

    name              for people
    aliases           other names by which people and files of measurements call it; large and small letters,
                      blanks, "-" and "_" make no difference
    relative          catalogue name of the nearest GPU with measured kernels: its shares of peak rate and
                      bandwidth hold wherever this one has no measured kernels of its own; left out: nobody's
    flop_rate         dense FLOP/s by number format, e.g. {bf16 = "989 TFLOP/s"}; formats that share the
                      rate of another one (fp8_block that of fp8) are not listed
    reached           share of flop_rate that the best matrix product anyone found reaches, by number format;
                      bounds prices that rest on another GPU's measurements; left out: nobody searched
    memory            HBM, bytes
    memory_bandwidth  HBM, bytes/s
    sms               streaming multiprocessors (compute units)
    launch_latency    the least time any operator takes, s
    l2                last-level cache shared by all SMs, bytes; left out where nobody states it
    power             what the board may draw, W; left out where nobody states it
    boost_clock       of the SMs, Hz; left out where nobody states it
    architecture      whose measured costs of exchanges hold: ampere, hopper or blackwell; left out: nobody's,
                      and an exchange costs launch_latency beside paths and bandwidth
    source            where the numbers come from; an entry without one does not load. Clauses of the form
                      `memory, sms: what they come from`, with semicolons between them
    """

    name: str
    aliases: tuple[str, ...] = ()
    relative: str | None = None
    flop_rate: dict[str, FlopRate] = Field(min_length=1)
    reached: dict[str, Fraction] | None = None
    memory: Size
    memory_bandwidth: Bandwidth
    sms: Count
    launch_latency: Time
    l2: Size | None = None
    power: Power | None = None
    boost_clock: Frequency | None = None
    architecture: Architecture | None = None
    source: str = Field(min_length=1)

    @field_validator("flop_rate")
    @classmethod
    def _in_order(cls, value: dict[str, float]) -> dict[str, float]:
        """Equal GPUs are to be written as equal text, in whatever order their rates were given."""
        return dict(sorted(value.items()))

    @field_validator("aliases", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: object) -> object:
        """TOML has no tuples."""
        return tuple(value) if isinstance(value, list) else value


class Server(Value):
    """The box with GPUs, NVSwitches and NICs. Bandwidths are one way.

    name              for people
    gpu               each accelerator in the box
    gpus              how many there are, joined by NVSwitch or by what stands for it: xGMI, PCIe switches
    nvlink_bandwidth  of one GPU to the switches (or over xGMI or PCIe to all others), bytes/s
    nvlink_latency    GPU to GPU inside the box, s
    nics              network cards; with fewer cards than GPUs, GPU g uses card g * nics // gpus; with
                      more, card c belongs to GPU c * gpus // nics, and a flow is striped over all
                      cards of its GPU
    nic_bandwidth     of one card, bytes/s
    nic_latency       GPU to GPU of another server through one leaf switch, s
    pcie_bandwidth    between a GPU and its card, bytes/s
    fabric            what the cards speak, whose measured costs hold: infiniband, or ethernet for anything
                      else (RoCE, EFA)
    switch_reduces    whether the NVSwitches can add up and copy what passes (NVLink SHARP, from H100 on)
    source            where the numbers come from
    """

    name: str
    gpu: Gpu
    gpus: Count
    nvlink_bandwidth: Bandwidth
    nvlink_latency: Time
    nics: Count
    nic_bandwidth: Bandwidth
    nic_latency: Time
    pcie_bandwidth: Bandwidth
    fabric: Fabric = "infiniband"
    switch_reduces: bool = True
    source: str = Field(min_length=1)


class SingleServer(Value):
    """One server: NVLink only.

    server  the box
    """

    family: Literal["single_server"]
    server: Server


LoadBalancing = Literal["ecmp", "spray"]
Oversubscription = Annotated[float, Field(gt=0.0, le=1000.0)]


class RailFatTree(Value):
    """Rail-optimised leaf–spine: card i of every server of a pod hangs on leaf i of that pod.

    A flow to another card position first crosses NVLink to the GPU that sits on the right rail
    (what NCCL calls PXN), so that within a pod no flow needs a spine. With spines this is the
    multi-plane fat tree of the DeepSeek-V3 paper: card i of all servers is a network of its own.

    server            each box
    servers           in all
    servers_per_pod   servers that share a set of leaves; must divide `servers`; 0 means all
    spines            per rail, joined to that rail's leaf of every pod; 0 with a single pod, or to have
                      them counted from `oversubscription`
    uplink_bandwidth  of one leaf to one spine, bytes/s; by default 400 Gb/s, or what
                      `oversubscription` asks of the given spines
    oversubscription  of a leaf: bandwidth of its cards ÷ bandwidth of its uplinks; with it, spines or
                      uplink_bandwidth may be left out
    uplink_latency    leaf to leaf through a spine, s
    planes            parallel networks of leaves and spines; each card has a port of an equal part of its
                      bandwidth in each
    load_balancing    ecmp: a flow takes one of the equal ways, by a hash; spray: its packets are spread
                      over all of them, and idle ones are preferred (adaptive routing): they are one
                      link of summed bandwidth, so a fault of one of n is a factor n / (n - 1) on it
    """

    family: Literal["rail_fat_tree"]
    server: Server
    servers: Count
    servers_per_pod: Whole = 0
    spines: Whole = 0
    uplink_bandwidth: Bandwidth | None = None
    oversubscription: Oversubscription | None = None
    uplink_latency: Time = UPLINK_LATENCY
    planes: Count = 1
    load_balancing: LoadBalancing = "ecmp"


class FatTree(Value):
    """Leaf–spine without rails: all cards of a server hang on the same leaf.

    server            each box
    servers           in all
    servers_per_leaf  servers whose cards hang on one leaf; must divide `servers`
    spines            every leaf is joined to every spine; 0 to have them counted from
                      `oversubscription` and `uplink_bandwidth`
    uplink_bandwidth  of one leaf to one spine, bytes/s; may be left out where `oversubscription` says it
    oversubscription  of a leaf: bandwidth of its cards ÷ bandwidth of its uplinks; with it, spines or
                      uplink_bandwidth may be left out
    uplink_latency    leaf to leaf through a spine, s
    planes            parallel networks of leaves and spines; each card has a port of an equal part of its
                      bandwidth in each
    load_balancing    ecmp: a flow takes one of the equal ways, by a hash; spray: its packets are spread
                      over all of them, and idle ones are preferred (adaptive routing): they are one
                      link of summed bandwidth, so a fault of one of n is a factor n / (n - 1) on it
    """

    family: Literal["fat_tree"]
    server: Server
    servers: Count
    servers_per_leaf: Count
    spines: Whole = 0
    uplink_bandwidth: Bandwidth | None = None
    oversubscription: Oversubscription | None = None
    uplink_latency: Time = UPLINK_LATENCY
    planes: Count = 1
    load_balancing: LoadBalancing = "ecmp"


class Nvl72(Value):
    """NVLink racks of `trays` servers behind one switch plane, joined by rails.

    racks             in all
    trays             servers per rack; all their GPUs share one NVLink domain
    server            one tray
    spines            per card position, joining the racks' leaves; with 0 one leaf joins all trays, or
                      `oversubscription` says how many there are
    uplink_bandwidth  of one leaf to one spine, bytes/s; by default 400 Gb/s, or what
                      `oversubscription` asks of the given spines
    oversubscription  of a leaf: bandwidth of its cards ÷ bandwidth of its uplinks; with it, spines or
                      uplink_bandwidth may be left out
    uplink_latency    leaf to leaf through a spine, s
    planes            parallel networks of leaves and spines; each card has a port of an equal part of its
                      bandwidth in each
    load_balancing    ecmp: a flow takes one of the equal ways, by a hash; spray: its packets are spread
                      over all of them, and idle ones are preferred (adaptive routing): they are one
                      link of summed bandwidth, so a fault of one of n is a factor n / (n - 1) on it
    """

    family: Literal["nvl72"]
    server: Server
    racks: Count = 1
    trays: Count = 18
    spines: Whole = 0
    uplink_bandwidth: Bandwidth | None = None
    oversubscription: Oversubscription | None = None
    uplink_latency: Time = UPLINK_LATENCY
    planes: Count = 1
    load_balancing: LoadBalancing = "ecmp"


class Dragonfly(Value):
    """Groups of routers, every router joined to all of its group, every group to every other.

    Global link k of a group (router k // global_links) leads to the group k mod (groups - 1) + 1
    further on: the circulant arrangement. Of several equal ways a flow takes one, by a hash.

    server              each box; all its cards hang on one router
    groups              in all
    routers             per group
    servers_per_router  servers that hang on one router
    global_links        per router, to other groups; those of a group must be a multiple of groups - 1
    local_bandwidth     of a link between two routers of a group, bytes/s
    global_bandwidth    of one global link, bytes/s
    local_latency       added by a link within a group, s
    global_latency      added by a global link, s
    routing             minimal: one global link; valiant: two, through a third group chosen by a hash,
                        which evens out any traffic and halves the global bandwidth
    """

    family: Literal["dragonfly"]
    server: Server
    groups: Count
    routers: Count
    servers_per_router: Count
    global_links: Count
    local_bandwidth: Bandwidth
    global_bandwidth: Bandwidth
    local_latency: Time = UPLINK_LATENCY / 2
    global_latency: Time = UPLINK_LATENCY / 2
    routing: Literal["minimal", "valiant"] = "minimal"


VertexKind = Literal["gpu", "nvswitch", "nic", "leaf", "spine", "router"]


class Vertex(Value):
    """One named part of a vertex-by-vertex topology.

    name    unique
    kind    what it is
    server  number of the box it sits in
    """

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.:/-]+$")
    kind: VertexKind
    server: Annotated[int, Field(ge=0)] = 0


class Cable(Value):
    """Joins two vertices.

    ends       names of the two
    bandwidth  one way, bytes/s
    latency    s
    one_way    only from the first to the second
    """

    ends: tuple[str, str]
    bandwidth: Bandwidth
    latency: Time
    one_way: bool = False

    @field_validator("ends", mode="before")
    @classmethod
    def _list_is_pair(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class VertexByVertex(Value):
    """A topology given vertex by vertex; all GPUs are of one kind.

    Where a GPU has several cards, or a switch several equal ways, a flow takes one by a hash. To have it
    use all of them, write them as one with their bandwidths together, as the families do.

    gpu             every accelerator in it
    vertices        GPUs, switches and cards; GPUs are ranked in this order
    cables          what joins them
    fabric          as of a server
    switch_reduces  as of a server
    """

    family: Literal["explicit"]
    gpu: Gpu
    vertices: tuple[Vertex, ...] = Field(min_length=1, max_length=200_000)
    cables: tuple[Cable, ...] = Field(max_length=1_000_000)
    fabric: Fabric = "infiniband"
    switch_reduces: bool = True

    @field_validator("vertices", "cables", mode="before")
    @classmethod
    def _list_is_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


TopologySpec = Annotated[
    SingleServer | RailFatTree | FatTree | Nvl72 | Dragonfly | VertexByVertex, Field(discriminator="family")
]
