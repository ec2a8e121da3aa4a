"""Measured rows of collectives → the machine they ran on, in the terms of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from clustersim.physics.startup import Shape
from clustersim.spec.library import IN_SWITCH
from clustersim.study.measured import Table

_MICRO = 1e-6
#: Path latencies as in catalogue/servers.toml.
_NVLINK_LATENCY, _NETWORK_LATENCY = 0.6e-6, 2.68e-6
#: What "large message, size not recorded" is taken to be, bytes.
_LARGE = 2.0**34
#: Fabric of rows that stay in one domain, where any does; and of sets that state no speed of their cards
#: (coreweave_GB200_128, issue_nccl#1801), for which 400 Gb/s per GPU is taken.
_NO_NETWORK = ("infiniband", 50e9)

#: First letters of a GPU's name → architecture, NVLink bytes/s of a GPU one way (data sheet).
_GPUS = {
    "A100": ("ampere", 300e9),
    "H100": ("hopper", 450e9),
    "H200": ("hopper", 450e9),
    "B200": ("blackwell", 900e9),
    "GB200": ("blackwell", 900e9),
    "GB300": ("blackwell", 900e9),
}

#: nccl-tests' word → kind of exchange.
KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "sendrecv": "point_to_point",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One measured row.

    number     its place in the table
    kind       a key of KINDS
    what       hardware and software, for people
    size       bytes as `physics.startup` counts them
    measured   s
    fabric     infiniband or ethernet; any where the row stays in one domain
    servers    boxes, for people
    algorithm  the one the row's configuration forced, else ""
    fitted     whether the fit sees it
    kernel     custom kernel's group, "" for the library
    shots      how many of one-shot and two-shot the custom kernel knows
    most       bytes above which the custom kernel is given up
    eager      launched by the host one by one instead of from a CUDA graph
    """

    number: int
    kind: str
    what: str
    architecture: str
    shape: Shape
    size: float
    measured: float
    fabric: str = _NO_NETWORK[0]
    servers: int = 1
    algorithm: str = ""
    fitted: bool = True
    kernel: str = ""
    shots: int = 2
    most: float = np.inf
    eager: bool = False


Reader: TypeAlias = Callable[[Table], list[Row]]


def _shape(
    gpu: str, members: int, domains: int, card: float = _NO_NETWORK[1], in_switch: bool = True
) -> Shape:
    architecture, nvlink = _GPUS[_model(gpu)]
    can = int(in_switch and architecture in IN_SWITCH)
    return Shape(members, domains, nvlink, _NVLINK_LATENCY, card, _NETWORK_LATENCY, can)


def _model(gpu: str) -> str:
    return gpu.split("-")[0].split(" ")[0]


def _each(table: Table) -> Iterator[tuple[int, dict[str, Any]]]:
    lists = {name: column.tolist() for name, column in table.items()}
    for number, row in enumerate(zip(*lists.values(), strict=True)):
        yield number, dict(zip(lists, row, strict=True))


def nccl_intranode(table: Table) -> list[Row]:
    """NCCL in one domain."""
    return [
        Row(
            number,
            row["op"],
            f"{row['gpu']}, NCCL {row['nccl']}, {row['dtype']}",
            _GPUS[_model(row["gpu"])][0],
            # NVLS sums floating-point numbers only.
            _shape(row["gpu"], row["num_gpus"], 1, in_switch=row["dtype"] != "int8"),
            row["bytes"],
            row["time_us"] * _MICRO,
        )
        for number, row in _each(table)
    ]


@dataclass(frozen=True, slots=True)
class _Set:
    """What a published data set does not say in columns of its own.

    domains  NVLink domains
    fabric   kind of network and bytes/s of it per GPU
    forced   algorithm its configuration forces; in_switch: whether NVLS is allowed
    why_not  why the fit does not see it
    """

    domains: int = 1
    fabric: tuple[str, float] = _NO_NETWORK
    forced: str = ""
    in_switch: bool = True
    why_not: str = ""


_TORCH = "timed around a framework's call, or by an unknown version"
_STATED = "a single statement, not a log"
_BELOW = "its source says that several of its rows are below what the cards allow"
_LARGER = "more GPUs than the fit sees: foretold"
# The slowest of its cards by ib_write_bw: 39.54 GiB/s (measured/network_point_measurements).
_VULTR = ("infiniband", 39.54 * 2**30)

#: Cards of that machine which reach a seventh less than the others.
_SLOW_CARDS = ("mlx5_4", "mlx5_9", "mlx5_12", "mlx5_13")

#: Data set → what its name and notes say. Sets that are not here stay in one domain.
_SETS: dict[str, _Set] = {
    "stas_a100_1n": _Set(why_not=_TORCH),
    "stas_b200_1n": _Set(why_not=_TORCH),
    "stas_h200_1n_ring": _Set(in_switch=False, why_not=_TORCH),
    "coreweave_GB200_128": _Set(2, why_not=_LARGER),
    "oci_gb300_all_reduce_64": _Set(why_not=_LARGER),
    "gcp_b200_2n": _Set(2, ("ethernet", 50e9)),
    "gke_b200_ag": _Set(2, ("ethernet", 50e9)),
    "issue_nccl#1221": _Set(why_not=_STATED),
    "issue_nccl-tests#212": _Set(why_not=_STATED),
    "issue_nccl#1455": _Set(why_not=_STATED),
    "issue_nccl-tests#272": _Set(why_not=_STATED),
    "issue_nccl#1801": _Set(3, forced="ring", why_not=_STATED),
    "h100_309_2n": _Set(2),
    "h100_309b_2n": _Set(2),
    "h100_309b_2n_ring": _Set(2, forced="ring"),
    "h100_a3mega_ag": _Set(2, ("ethernet", 25e9)),
    "a100_oci_2n": _Set(2, ("ethernet", 25e9)),
    "vultr_b200_all_gather_16": _Set(2, _VULTR, why_not=_BELOW),
    "vultr_b200_reduce_scatter_16": _Set(2, _VULTR, why_not=_BELOW),
    "vultr_b200_sendrecv_16": _Set(2, _VULTR, why_not=_BELOW),
    "vultr_b200_sendrecv_8": _Set(why_not="from 16 to 512 MiB its time does not depend on size"),
    "p5en_gin_p2p": _Set(2, ("ethernet", 50e9), why_not="a one-sided put through a CPU proxy"),
}

#: Data sets the model does not speak about → why.
NOT_MODELLED = {
    "a100_abci_2n_sharp": "reduction in the network's switches (SHARP), NCCL 2.8",
    "stas_p2p": "a copy between two GPUs without the library; no time",
    "issue_nccl#1649": "number of GPUs not stated",
}


def collectives_published(table: Table) -> list[Row]:
    """Published nccl-tests output."""
    return [
        _published(number, row, _SETS.get(row["dataset"], _Set()))
        for number, row in _each(table)
        if row["dataset"] not in NOT_MODELLED
    ]


def _published(number: int, row: Mapping[str, Any], known: _Set) -> Row:
    members = int(row["n_gpus"])
    domains = known.domains
    note = row["note"]
    if row["dataset"] == "issue_nccl#1221" and row["nodes"] == 2:
        domains, known = 2, _Set(2, ("ethernet", 50e9), why_not=_STATED)
    size = row["bytes"] if row["bytes"] > 0 else _LARGE
    seconds = row["time_us"] * _MICRO
    if not seconds > 0:
        seconds = size * _bus_factor(row["op"], members) / (row["busbw_GBps"] * 1e9)
    return Row(
        number,
        row["op"],
        f"{row['dataset']}: {row['gpu']}" + (f", {row['inter_node_fabric']}" if domains > 1 else ""),
        _GPUS[_model(row["gpu"])][0],
        _shape(
            row["gpu"], members, domains, known.fabric[1],
            known.in_switch and "NVLS off" not in note and not note.startswith("ring"),
        ),
        size,
        seconds,
        known.fabric[0],
        int(row["nodes"]) if row["nodes"] > 0 else domains,
        known.forced,
        not known.why_not and not note.startswith("in-place time 13.52"),
    )  # fmt: skip


def _bus_factor(op: str, members: int) -> float:
    """nccl-tests: bus bandwidth / algorithm bandwidth."""
    return {"all_reduce": 2 * (members - 1) / members, "sendrecv": 1.0}.get(op, (members - 1) / members)


#: Start of `impl` → (library, shots it knows).
_KERNELS = {"TRTLLM": ("trtllm", 1), "vLLM": ("vllm", 2), "SGLang": ("sglang", 2)}
#: (library, architecture) → bytes up to which its own kernel is taken; above, NCCL is. Read off these
#: rows: where a library's time jumps to what NCCL takes. trtllm: as long as it is quicker.
_MOST = {
    ("vllm", "ampere"): 8 * 2.0**20 - 1,
    ("vllm", "hopper"): 8 * 2.0**20 - 1,
    ("vllm", "blackwell"): 32 * 2.0**20,
    ("sglang", "ampere"): 8 * 2.0**20,
    ("sglang", "hopper"): 16 * 2.0**20,
    ("sglang", "blackwell"): 16 * 2.0**20,
}
#: Custom kernels there are parameters for.
KERNEL_GROUPS = [
    f"{library}_{gpu}" for library, _ in _KERNELS.values() for gpu in ("ampere", "hopper", "blackwell")
]


def custom_allreduce(table: Table) -> list[Row]:
    """All-reduce kernels of serving libraries."""
    found = []
    for number, row in _each(table):
        library, shots = next(known for start, known in _KERNELS.items() if row["impl"].startswith(start))
        architecture = _GPUS[_model(row["gpu"])][0]
        found.append(
            Row(
                number,
                "all_reduce",
                f"{row['gpu']}, {row['impl']} {row['version']}",
                architecture,
                _shape(row["gpu"], row["num_gpus"], 1),
                row["bytes"],
                row["time_us"] * _MICRO,
                kernel=f"{library}_{architecture}",
                shots=shots,
                most=_MOST.get((library, architecture), np.inf),
                eager=row["impl"].endswith("eager"),
            )
        )
    return found


def network_point_measurements(table: Table) -> list[Row]:
    """Floors of NCCL's small messages, and what one card writes; latencies of cards are inputs."""
    found = []
    for number, row in _each(table):
        if row["metric"].startswith("NCCL"):
            found.append(_floor(number, row))
        elif row["metric"].split(" ")[0] in ("ib_write_bw", "ib_send_bw"):
            found.append(_card(number, row))
    return found


def _floor(number: int, row: Mapping[str, Any]) -> Row:
    _, op, size, _ = row["metric"].split(" ")
    members = int(row["config"].split(" ")[1])
    domains = 2 if "2 nodes" in row["config"] else 1
    shape = _shape("B200", members, domains, _VULTR[1])
    seconds = row["value"] * _MICRO
    return Row(number, op, row["config"], "blackwell", shape, float(size), seconds, _VULTR[0], domains)


def _card(number: int, row: Mapping[str, Any]) -> Row:
    """One card of 400 Gb/s at full speed, told as a send of a large message."""
    unit = 2.0**30 if row["unit"].startswith("GiB/s") else 0.125e9
    slow = any(card in row["config"] for card in _SLOW_CARDS)
    return Row(
        number, "sendrecv", f"{row['metric']}: {row['config']}", "hopper", _shape("H100", 2, 2), _LARGE,
        _LARGE / (row["value"] * unit), "infiniband", 2, fitted=not slow and "expected" not in row["metric"],
    )  # fmt: skip


def vidur_network(table: Table) -> list[Row]:
    """Median times around a framework's calls on DGX servers; one server only: what joined several, and
    servers whose GPUs hang together in pairs, are not described."""
    kinds = {"all_reduce": "all_reduce", "send_recv": "sendrecv"}
    return [
        Row(
            number,
            kinds[row["op"]],
            f"{row['system']}, timed around a framework's call",
            _GPUS[row["system"][:4].upper()][0],
            _shape(row["system"][:4].upper(), row["num_workers"], 1),
            row["bytes"],
            row["time_us_med"] * _MICRO,
            fitted=False,
        )
        for number, row in _each(table)
        if row["system"].endswith("_dgx") and row["num_workers"] == row["devices_per_node"]
    ]


#: Measured table → its rows.
READERS: dict[str, Reader] = {
    "nccl_intranode": nccl_intranode,
    "collectives_published": collectives_published,
    "network_point_measurements": network_point_measurements,
    "custom_allreduce": custom_allreduce,
    "vidur_network": vidur_network,
}


def left_out() -> dict[tuple[str, str], str]:
    """(file, data set) → why the fit does not see it."""
    file = "collectives_published"
    not_fitted = {(file, name): one.why_not for name, one in _SETS.items() if one.why_not}
    not_fitted[("network_point_measurements", ", ".join(_SLOW_CARDS))] = "cards slower than their like"
    not_fitted[("network_point_measurements", "expected")] = "not measured"
    not_fitted[("vidur_network", "all")] = "medians of few calls, with what the framework does around them"
    return not_fitted | {(file, name): f"not predicted: {why}" for name, why in NOT_MODELLED.items()}
