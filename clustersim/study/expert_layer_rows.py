"""Measured expert layers: the rows of each file as kernel calls with tokens per expert.

The files name a load pattern; study.expert_loads says how many tokens each expert of the timed rank got.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.spec.kernel_tables import TableKey
from clustersim.study.expert_loads import (
    LOADS,
    arriving,
    block_counts,
    hot_rank_counts,
    known_load,
    random_counts,
    scaled_to_arrivals,
)
from clustersim.study.kernel_rows import (
    Rows,
    column,
    formats,
    gpus,
    libraries,
    lines_of,
    positive,
    seconds,
    whole,
)
from clustersim.study.least_squares import Parameter
from clustersim.study.measured import Table

#: A row that takes this many times as long as the next larger batch was timed on a kernel nobody would run.
_SPIKE = 2.0
#: So was a rank with half of the experts that takes this many times as long, and its whole layer where this
#: share of the rows is such.
_WRONG_WAY = 1.25
_OFTEN = 0.2
#: Tokens below which the launches of eager mode are most of a time.
_EAGER = 256
#: The layer that rtxpro6000_vllm_kernels.csv names. Source: its Hugging Face config.json.
_QWEN3_30B = {"hidden": 2048.0, "inter": 768.0, "experts": 128, "top_k": 8.0}


def fused_layers(table: Table, file: str) -> list[Rows]:
    """moe_kernels.csv: fused layers of three libraries; the rank sees all tokens of its group."""
    tokens, experts = whole(table, "num_tokens_global"), whole(table, "num_experts")
    ep, tp, top_k = whole(table, "moe_ep"), whole(table, "moe_tp"), whole(table, "topk")
    _divides(experts, ep, "num_experts", "moe_ep")
    _enough(experts, top_k, "topk")
    _divides(whole(table, "inter_size"), tp, "inter_size", "moe_tp")
    loads = [_pattern(*key) for key in _tuples(tokens, top_k, experts, ep, _distributions(table))]
    measured, patterns = seconds(table), _distributions(table)
    same = [libraries(table), formats(table), experts, tp, top_k, patterns, gpus(table)]
    same += [positive(table, "hidden_size"), positive(table, "inter_size")]
    spike = _slower(tokens, [*same, ep], measured, _SPIKE)
    layer = [column for column in same if column is not patterns]
    odd = _often(_slower(1.0 / ep, [*same, tokens], measured, _WRONG_WAY), [*layer, ep])
    doubt = np.where(odd, "one of a layer that takes longer than with twice the experts on a rank", "")
    doubt = np.where(spike, "more than twice the time of the next larger batch", doubt)
    return [
        Rows(
            file,
            "experts",
            gpus(table),
            libraries(table),
            formats(table),
            _columns(
                loads,
                positive(table, "hidden_size"),
                positive(table, "inter_size") / tp,
                top_k,
                tokens,
                tokens * top_k / experts,
            ),
            measured,
            lines_of(table),
            doubt,
        )
    ]


def wide_layers(table: Table, file: str) -> list[Rows]:
    """wideep_moe_sglang.csv: DeepGEMM with masked rows (decode) and contiguous blocks of rows (prefill)."""
    tokens, experts = whole(table, "num_tokens_global"), whole(table, "num_experts")
    ep, top_k = whole(table, "ep"), whole(table, "topk")
    _divides(experts, ep, "num_experts", "ep")
    _enough(experts, top_k, "topk")
    prefill = np.array([str(phase) == "context" for phase in column(table, "phase").tolist()])
    patterns = _distributions(table)
    loads = []
    for n, k, e, ranks, pattern, blocks in _tuples(tokens, top_k, experts, ep, patterns, prefill):
        even = pattern in ("uniform", "balanced")
        cut = blocks and even
        loads.append(block_counts(n * k / ranks, int(e // ranks)) if cut else _front(n, k, e, ranks, pattern))
    came = np.array([arriving(load, n) for load, n in zip(loads, tokens.tolist(), strict=True)])
    seen = np.where(prefill, tokens, came)
    library = np.where(prefill, "deepgemm_contiguous", "deepgemm_masked")
    columns = _columns(
        loads,
        positive(table, "hidden_size"),
        positive(table, "inter_size"),
        top_k,
        seen,
        tokens * top_k / experts,
    )
    return [_rows(table, file, "experts", library, columns)]


def skewed_layers(table: Table, file: str) -> list[Rows]:
    """wideep_moe_skew_trtllm_h100.csv: the hottest rank, with the tokens that were counted there."""
    tokens, experts = whole(table, "num_tokens_global"), whole(table, "num_experts")
    ep, top_k = whole(table, "ep"), whole(table, "topk")
    slots = whole(table, "num_slots") if "num_slots" in table else experts
    _divides(slots, ep, "num_slots", "ep")
    _enough(slots, experts, "num_experts")
    _enough(experts, top_k, "topk")
    patterns = _distributions(table)
    loads = [_front(*key) for key in _tuples(tokens, top_k, experts, ep, patterns, slots)]
    counted = "tokens_arriving_at_hot_rank"
    if counted in table:
        came = np.minimum(positive(table, counted), tokens)
        loads = [scaled_to_arrivals(*one) for one in zip(loads, tokens.tolist(), came.tolist(), strict=True)]
    else:
        came = np.array([arriving(load, n) for load, n in zip(loads, tokens.tolist(), strict=True)])
    columns = _columns(
        loads,
        positive(table, "hidden_size"),
        positive(table, "inter_size"),
        top_k,
        came,
        tokens * top_k / slots,
    )
    return [_rows(table, file, "experts", np.full(len(tokens), "trtllm_wide"), columns)]


def single_products(table: Table, file: str) -> list[Rows]:
    """infersim_h800_grouped_gemm.csv: both grouped products by themselves, every expert equally loaded."""
    held, each = whole(table, "num_local_experts"), positive(table, "tokens_per_expert")
    loads = [np.full(int(g), t) for g, t in zip(held.tolist(), each.tolist(), strict=True)]
    top_k, tokens = whole(table, "topk"), positive(table, "tokens_per_gpu")
    hidden, inter = positive(table, "hidden_size"), positive(table, "intermediate_size")
    columns = _columns(loads, hidden, inter, top_k, tokens)
    decode = np.array([str(phase) == "decode" for phase in column(table, "phase").tolist()])
    library = np.where(decode, "deepgemm_masked", "deepgemm_contiguous")
    few = "half the time of two tokens per expert: half of the experts can have been read"
    doubt = np.where(decode & (each == 1), few, "")
    return [
        Rows(
            file,
            kernel,
            gpus(table),
            library,
            np.full(len(held), "fp8_block"),
            columns,
            seconds(table, measured),
            lines_of(table),
            doubt,
        )
        for kernel, measured in (("expert_up", "gate_up_us"), ("expert_down", "down_us"))
    ]


def eager_layers(table: Table, file: str) -> list[Rows]:
    """frontier_a800_moe.csv: vLLM's fused layer, tokens sent to experts at random."""
    tokens, held = whole(table, "num_tokens_on_this_rank"), whole(table, "local_experts")
    top_k, tp = whole(table, "topk"), whole(table, "moe_tp")
    loads = [random_counts(*key) for key in _tuples(tokens, top_k, held)]
    columns = _columns(
        loads, positive(table, "hidden_size"), positive(table, "inter_size") / tp, top_k, tokens
    )
    context = column(table, "context") if "context" in table else np.full(len(tokens), "")
    eager = (context == "standalone_legacy") & (tokens < _EAGER)
    doubt = np.where(eager, "about 0.2 ms of eager launches are in it", "")
    rows = _rows(table, file, "experts", np.full(len(tokens), "vllm"), columns, "grouped_gemm_us")
    return [_with_doubts(rows, doubt)]


def forced_layers(table: Table, file: str) -> list[Rows]:
    """rtxpro6000_vllm_kernels.csv, its fused layers: tokens spread evenly over a given number of experts."""
    kind = np.array([str(text) for text in column(table, "kind").tolist()])
    at = np.flatnonzero(kind == "fused_moe_forced_routing")
    if not len(at):
        return []
    tokens, used = whole(table, "tokens", at), whole(table, "activated_experts", at)
    q, experts = _QWEN3_30B, int(_QWEN3_30B["experts"])
    loads = [
        np.pad(np.full(int(a), n * q["top_k"] / a), (0, experts - int(a)))
        for n, a in zip(tokens.tolist(), used.tolist(), strict=True)
    ]
    tp = whole(table, "tp", at)
    ones = np.ones(len(at))
    columns = _columns(loads, ones * q["hidden"], q["inter"] / tp, ones * q["top_k"], tokens)
    return [
        Rows(
            file,
            "experts",
            gpus(table, at),
            np.full(len(at), "vllm"),
            np.full(len(at), "bf16"),
            columns,
            seconds(table, at=at),
            at,
            np.full(len(at), ""),
        )
    ]


def _rows(
    table: Table,
    file: str,
    kernel: str,
    library: np.ndarray,
    columns: dict[str, np.ndarray],
    time: str = "time_us",
) -> Rows:
    nothing = np.full(len(library), "")
    gpu, form, at = gpus(table), formats(table), lines_of(table)
    return Rows(file, kernel, gpu, library, form, columns, seconds(table, time), at, nothing)


def _with_doubts(rows: Rows, doubt: np.ndarray) -> Rows:
    return Rows(
        rows.file,
        rows.kernel,
        rows.gpu,
        rows.library,
        rows.format,
        rows.columns,
        rows.measured,
        rows.row,
        doubt,
    )


def _columns(
    loads: Sequence[np.ndarray],
    hidden: np.ndarray,
    inter: np.ndarray,
    top_k: np.ndarray,
    tokens: np.ndarray,
    even: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    widest = max(len(load) for load in loads)
    counts = np.zeros((len(loads), widest))
    for row, load in zip(counts, loads, strict=True):
        row[: len(load)] = load
    held = np.array([float(len(load)) for load in loads])
    gated = np.ones(len(loads))
    return {
        "counts": counts,
        "hidden": hidden,
        "inter": inter,
        "gated": gated,
        "top_k": top_k,
        "experts_held": held,
        "tokens": tokens,
        "even_rows": counts.sum(axis=1) / held if even is None else even,
    }


def _distributions(table: Table) -> np.ndarray:
    """str[N] load patterns; balanced in a file that names none."""
    if "distribution" not in table:
        return np.full(len(lines_of(table)), "balanced")
    patterns = np.array([str(text) for text in column(table, "distribution").tolist()], dtype=str)
    for pattern in np.unique(patterns).tolist():
        if not known_load(pattern):
            line = int(np.argmax(patterns == pattern)) + 2
            raise ClustersimError(
                f'line {line}: distribution = "{pattern}" is no known load; there are {LOADS}'
            )
    return patterns


def _tuples(*columns: np.ndarray) -> list[tuple[Any, ...]]:
    return list(zip(*(c.tolist() for c in columns), strict=True))


@cache
def _pattern(tokens: float, top_k: float, experts: float, ep: float, pattern: str) -> np.ndarray:
    return hot_rank_counts(int(tokens), int(top_k), int(experts), int(ep), pattern)


@cache
def _front(
    tokens: float, top_k: float, experts: float, ep: float, pattern: str, slots: float = 0
) -> np.ndarray:
    return hot_rank_counts(int(tokens), int(top_k), int(experts), int(ep), pattern, int(slots), front=True)


def _divides(whole_: np.ndarray, parts: np.ndarray, name: str, by: str) -> None:
    wrong = whole_ % parts != 0
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ClustersimError(
            f"line {row + 2}: {by} = {parts[row]:.0f} does not divide {name} = {whole_[row]:.0f}"
        )


def _enough(most: np.ndarray, asked: np.ndarray, name: str) -> None:
    wrong = asked > most
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ClustersimError(
            f"line {row + 2}: {name} = {asked[row]:.0f} is more than the {most[row]:.0f} there are"
        )


def _slower(size: np.ndarray, same: Sequence[np.ndarray], measured: np.ndarray, factor: float) -> np.ndarray:
    """bool[N] rows that take more than `factor` times as long as the next larger of those else the same."""
    order = np.lexsort((size, *same))
    alike = np.all([column[order][1:] == column[order][:-1] for column in same], axis=0)
    with np.errstate(invalid="ignore"):
        slow = alike & (measured[order][:-1] > factor * measured[order][1:])
    found = np.zeros(len(size), dtype=bool)
    found[order[:-1][slow]] = True
    return found


def _often(odd: np.ndarray, same: Sequence[np.ndarray]) -> np.ndarray:
    """bool[N] all rows of layers of which at least _OFTEN are odd."""
    _, numbers_ = zip(*(np.unique(column, return_inverse=True) for column in same), strict=True)
    _, layer = np.unique(np.stack(numbers_, axis=1), axis=0, return_inverse=True)
    layer = layer.ravel()
    found: np.ndarray = (np.bincount(layer, weights=odd) >= _OFTEN * np.bincount(layer))[layer]
    return found


#: Measured table → its reader: (table, file) to rows.
READERS: dict[str, Callable[[Table, str], list[Rows]]] = {
    "moe_kernels": fused_layers,
    "wideep_moe_sglang": wide_layers,
    "wideep_moe_skew_trtllm_h100": skewed_layers,
    "infersim_h800_grouped_gemm": single_products,
    "frontier_a800_moe": eager_layers,
    "rtxpro6000_vllm_kernels": forced_layers,
}

_START = {
    "launch": Parameter(2.5e-5, 1e-6, 5e-4),
    "per_expert": Parameter(1e-8, 1e-10, 2e-6, prior=3.0),
    "reach": Parameter(0.7, 0.1, 1.0),
    "bandwidth": Parameter(0.9, 0.3, 1.0),
    "overlap": Parameter(3.0, 1.0, 8.0),
    "depth": Parameter(100.0, 10.0, 2000.0),
    "head_rows": Parameter(16.0, 1.0, 400.0),
    "last_wave": Parameter(0.5, 0.05, 1.0),
    "tuned": Parameter(0.5, 0.01, 1.0),
    "throttle": Parameter(0.1, 0.001, 3.0),
    "row_passes": Parameter(4.0, 0.1, 40.0),
    "inner_passes": Parameter(2.0, 0.1, 40.0),
    "token_passes": Parameter(1.0, 0.05, 20.0),
}


def _start(_: TableKey) -> Mapping[str, Parameter]:
    return _START


STARTS = {"experts": _start, "expert_up": _start, "expert_down": _start}
