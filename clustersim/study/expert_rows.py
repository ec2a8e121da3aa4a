"""Measured rows of expert exchanges, read as what each library had to do: from tables to `Load`s.

Byte formats, top-k and which rows are not trusted are known here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.physics.expert_exchange import (
    HEADER,
    NORMAL_SMS,
    Load,
    Rows,
    row_bytes,
    rows_per_token,
    sms_for,
)
from clustersim.study.measured import Table, measured
from clustersim.study.prediction import ruled_by

#: From here on, scale is foretold and not fitted.
FITTED_UP_TO = 32

#: SMs of the GPUs in the tables. Source: as sms in catalogue/gpus.toml.
_SMS = {"H100-SXM-80GB": 132, "B200-SXM": 148, "GB200": 148}
#: NVLink of one GPU, one way, bytes/s. Source: as in catalogue/servers.toml. Where the GPU is not stated,
#: and where NVLink is not used, that of the H100.
_NVLINK = {"H100-SXM-80GB": 450e9, "H200-SXM-141GB": 450e9, "B200-SXM": 900e9, "GB200": 900e9}
#: Cards at 400 Gb/s per GPU, bytes/s; with EFA, two of 200 Gb/s. Source: column `fabric`.
_NIC = 50e9
#: GPUs that share an NVLink domain: a server, or a rack of GB200.
_DOMAIN = {"GB200": 72}
#: Path's latency, s: NVLink and one leaf, as in catalogue/servers.toml.
_LATENCY = (0.6e-6, 2.68e-6)


@dataclass(frozen=True, slots=True)
class Case:
    """One measured time, ready for the model.

    file, row  where it stands; group: whose costs it takes; kind: dispatch, combine, ...
    what       for people
    members    ranks; domain: of them in one NVLink domain
    tokens     of each rank; width: bytes of a row; payload: those of them that are numbers of the model
    rows       of one token; experts, sms, nvlink as in Load
    measured   s
    doubt      why it is not fitted though it is small enough; "" for nothing
    flagged    whether its source or the table says that the number itself is suspect: not judged either
    """

    file: str
    row: int
    group: str
    kind: str
    what: str
    members: int
    domain: int
    tokens: int
    width: float
    payload: float
    rows: Rows
    experts: int
    sms: int
    nvlink: float
    measured: float
    doubt: str = ""
    flagged: bool = False

    @property
    def fitted(self) -> bool:
        """Whether the fit may see it."""
        return not self.doubt and not self.flagged and self.members <= FITTED_UP_TO

    @property
    def size(self) -> float:
        """Payload that leaves a rank, bytes."""
        return self.tokens * (self.rows.nvlink + self.rows.nic) * self.payload

    @property
    def ruled(self) -> Any:
        """Whether bandwidth or latency rules: by how long the busiest port needs for the payload."""
        nvlink, nic = self.rows.nvlink / self.nvlink, self.rows.nic / _NIC
        return ruled_by(self.tokens * self.payload * max(nvlink, nic), self.measured)


def load_of(cases: Sequence[Case]) -> Load:
    """All cases as one Load of float64[N]."""

    def column(name: str) -> np.ndarray:
        return np.array([getattr(case, name) for case in cases], dtype=float)

    def per_token(name: str) -> np.ndarray:
        return np.array([getattr(case.rows, name) for case in cases], dtype=float)

    return Load(
        tokens=column("tokens"),
        row=column("width"),
        copies=per_token("copies"),
        nvlink_rows=per_token("nvlink"),
        nic_rows=per_token("nic"),
        experts=column("experts"),
        abroad=per_token("abroad"),
        sms=column("sms"),
        nvlink_bandwidth=column("nvlink"),
        nic_bandwidth=np.full(len(cases), _NIC),
    )


def latency_of(cases: Sequence[Case]) -> np.ndarray:
    """float64[N] s of the longest path of each case."""
    return np.array([_LATENCY[case.rows.nic > 0] for case in cases])


def _lines(table: Table) -> Iterator[tuple[int, dict[str, Any]]]:
    columns = {name: column.tolist() for name, column in table.items()}
    for row in range(len(columns["source"])):
        yield row, {name: column[row] for name, column in columns.items()}


def low_latency_h100(table: Table) -> list[Case]:
    """deepep_low_latency_h100: fp8 dispatch with scales, bf16 combine."""
    return [
        case for row, line in _lines(table) for case in _low_latency(row, line, "deepep_low_latency_h100")
    ]


def low_latency_blackwell(table: Table) -> list[Case]:
    """deepep_low_latency_blackwell: one server, of which the source does not say how many GPUs it has.

    Eight for B200, four for GB200 (a tray): with these, one share of NVLink's bandwidth explains the
    large exchanges of both within 3 %.
    """
    members = {"B200-SXM": 8, "GB200": 4}
    return [
        case
        for row, line in _lines(table)
        for case in _low_latency(
            row, {**line, "ep": members[line["gpu"]]}, "deepep_low_latency_blackwell", "_blackwell"
        )
    ]


def _low_latency(row: int, line: Mapping[str, Any], file: str, which: str = "") -> Iterator[Case]:
    hidden, experts, members = line["hidden_size"], line["num_experts"], line["ep"]
    for kind, width, payload in (
        ("dispatch", row_bytes(hidden, "fp8") + HEADER, hidden),
        ("combine", 2 * hidden, 2 * hidden),
    ):
        yield Case(
            file=file,
            row=row,
            group=f"deepep_low_latency{which}_{kind}",
            kind=kind,
            what=f"DeepEP low latency, {line['gpu']}",
            members=members,
            domain=min(8, members),
            tokens=line["tokens_per_rank"],
            width=width,
            payload=payload,
            rows=rows_per_token("low_latency", members, 8, line["num_topk"], experts),
            experts=experts,
            sms=sms_for(experts, _SMS[line["gpu"]]),
            nvlink=_NVLINK[line["gpu"]],
            measured=line[f"{kind}_us"] * 1e-6,
        )


def normal_h100(table: Table) -> list[Case]:
    """deepep_normal_h100: the notify phase and the transmission together, as a caller waits for both."""
    cases = []
    for row, line in _lines(table):
        hidden, members = line["hidden_size"], line["ep"]
        for kind, width, payload in (
            ("dispatch", row_bytes(hidden, "fp8"), hidden),
            ("combine", 2 * hidden, 2 * hidden),
        ):
            cases.append(
                Case(
                    file="deepep_normal_h100",
                    row=row,
                    group=f"deepep_normal_{kind}",
                    kind=kind,
                    what=f"DeepEP normal, {line['gpu']}, {line[f'{kind}_sms']} SMs",
                    members=members,
                    domain=8,
                    tokens=line["tokens_per_rank"],
                    width=width,
                    payload=payload,
                    rows=rows_per_token("hierarchical", members, 8, line["num_topk"], line["num_experts"]),
                    experts=line["num_experts"],
                    sms=line[f"{kind}_sms"],
                    nvlink=_NVLINK[line["gpu"]],
                    measured=(line[f"{kind}_transmit_us"] + line[f"{kind}_notify_us"]) * 1e-6,
                    flagged=bool(line["suspect"]),
                )
            )
    return cases


#: What the source calls a format → our name and the bytes of its numbers, scales not counted.
_FORMAT = {"bfloat16": "bf16", "fp8": "fp8", "nvfp4": "nvfp4"}
_NUMBERS = {"bfloat16": 2.0, "fp8": 1.0, "nvfp4": 0.5}


def nvlink_gb200(table: Table) -> list[Case]:
    """nvlink_a2a_gb200: one rank per GPU of one rack; gating such that a token meets as many ranks as it can.

    Times at EP8 and EP16 differ by 7 %, as rows per token do if each token goes to min(EP, top-k)
    ranks (7 and 7.5 to others); under random gating they would differ by 28 %.
    """
    cases = []
    for row, line in _lines(table):
        sided = "one_sided" if line["kernel_source"] == "NVLinkOneSided" else "two_sided"
        kind = line["op_name"].removeprefix("alltoall_")
        dtype = line["moe_dtype"]
        # Results come back in bf16 whatever went out; `prepare` exchanges counts, no rows.
        sent = {"combine": "bfloat16", "combine_low_precision": "nvfp4"}.get(kind, dtype)
        none = kind == "prepare"
        hidden, members = line["hidden_size"], line["moe_ep_size"]
        cases.append(
            Case(
                file="nvlink_a2a_gb200",
                row=row,
                group=f"trtllm_{sided}_{kind}",
                kind=kind,
                what=f"TensorRT-LLM {sided}, GB200, {dtype}",
                members=members,
                domain=_DOMAIN["GB200"],
                tokens=line["num_tokens"],
                width=0.0 if none else row_bytes(hidden, _FORMAT[sent]),
                payload=0.0 if none else hidden * _NUMBERS[sent],
                rows=rows_per_token(sided, members, 72, line["topk"], line["num_experts"], "even"),
                experts=line["num_experts"],
                sms=1,
                nvlink=_NVLINK["GB200"],
                measured=line["time_us"] * 1e-6,
            )
        )
    return cases


#: (library, mode, fabric; each by what it contains) → (group, way of sending).
_PUBLISHED = (
    ("DeepEP V1", "", "", "deepep_low_latency", "low_latency_by_nic"),
    ("UCCL-EP", "low_latency", "EFA", "uccl_low_latency_efa", "low_latency"),
    ("UCCL-EP", "normal", "EFA", "uccl_normal_efa", "hierarchical"),
    ("pplx-garden", "", "CX7", "pplx_garden_cx7", "low_latency"),
    ("pplx-garden", "", "EFA", "pplx_garden_efa", "low_latency"),
    ("pplx-kernels NVLINK", "", "", "pplx_kernels_nvlink", "low_latency"),
    ("pplx-kernels IBGDA", "", "", "pplx_kernels_ibgda", "low_latency"),
    ("pplx-kernels IBRC", "", "", "pplx_kernels_ibrc", "low_latency"),
    ("NCCL", "", "", "nccl_padded", "pairwise"),
    ("TensorRT-LLM", "", "", "trtllm_one_sided", "one_sided"),
)


def published(table: Table) -> list[Case]:
    """moe_a2a_published, but for rows that state no time (UCCL-EP on MI300X)."""
    return [_published(row, line) for row, line in _lines(table) if np.isfinite(line["time_us"])]


def _published(row: int, line: Mapping[str, Any]) -> Case:
    group, way = next(
        (group, way)
        for library, mode, fabric, group, way in _PUBLISHED
        if library in line["library"] and mode in line["mode"] and fabric in line["fabric"]
    )
    members, hidden, kind = line["ep"], line["hidden"], line["phase"]
    if group == "pplx_garden_efa" and members <= 8:
        # Inside a server the fabric plays no part: the same kernel, measured twice.
        group = "pplx_garden_cx7"
    gpu = next((name for name in _NVLINK if name in line["gpu"]), "H100-SXM-80GB")
    gb200 = gpu == "GB200"
    domain = _DOMAIN.get(gpu, 8)
    # Rows that leave the number of experts open are DeepSeek's: 256.
    experts = 256 if np.isnan(line["num_experts"]) else int(line["num_experts"])
    # A padded buffer holds a row for every expert, wanted or not.
    copies = experts if way == "pairwise" else line["topk"]
    width = 2 * hidden if line["dtype"] == "bf16" else row_bytes(hidden, "fp8")
    return Case(
        file="moe_a2a_published",
        row=row,
        group=f"{group}_{kind}",
        kind=kind,
        what=f"{line['library']}, {line['gpu']}, {line['fabric']}",
        members=members,
        domain=domain,
        tokens=line["tokens_per_rank"],
        width=width,
        payload=2 * hidden if line["dtype"] == "bf16" else hidden,
        rows=rows_per_token(way, members, domain, copies, experts, "even" if gb200 else "random"),
        experts=experts,
        sms=_published_sms(group, experts),
        nvlink=_NVLINK[gpu],
        measured=line["time_us"] * 1e-6,
        doubt="held up by something else than wires" if "far from the wire limit" in line["note"] else "",
        flagged=line["trust"] == "low",
    )


def _published_sms(group: str, experts: int) -> int:
    if group in ("deepep_low_latency", "uccl_low_latency_efa"):
        return sms_for(experts, 132)
    return NORMAL_SMS if group == "uccl_normal_efa" else 1


#: Measured table → its cases.
READERS = {
    "deepep_low_latency_h100": low_latency_h100,
    "deepep_normal_h100": normal_h100,
    "nvlink_a2a_gb200": nvlink_gb200,
    "moe_a2a_published": published,
    "deepep_low_latency_blackwell": low_latency_blackwell,
}


def all_cases() -> list[Case]:
    """Every row of every table."""
    return [case for name, read in READERS.items() for case in read(measured(name))]
