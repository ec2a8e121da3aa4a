"""Measured expert layers: the rows of each file as kernel calls with tokens per expert.

The files name a load pattern; study.expert_loads says how many tokens each expert of the timed rank got.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.spec.kernel_tables import TableKey
from clustersim.study.expert_loads import (
    LEVELLED,
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
    divides,
    enough,
    experts,
    formats,
    gpus,
    libraries,
    line_of,
    lines_of,
    phases,
    positive,
    seconds,
    whole,
)
from clustersim.study.layer_profiles import model_widths, rows_of_kind
from clustersim.study.least_squares import Parameter
from clustersim.study.measured import Table

#: A row that takes this many times as long as the next larger batch was timed on a kernel nobody would run.
_SPIKE = 2.0
#: So was a rank with half of the experts that takes this many times as long, and its whole layer where this
#: share of the rows is such.
_WRONG_WAY = 1.25
_OFTEN = 0.2
#: Loads that are kept for rows to come.
_KEPT = 4096
#: Tokens of a rank at most whose choice of experts is drawn at random.
_MOST_DRAWN = 2**22
#: Tokens below which the launches of eager mode are most of a time.
_EAGER = 256


def fused_layers(table: Table, file: str) -> list[Rows]:
    """moe_kernels.csv: fused layers of three libraries; the rank sees all tokens of its group."""
    tokens, of_all = whole(table, "num_tokens_global"), experts(table, "num_experts")
    ep, tp, top_k = whole(table, "moe_ep"), whole(table, "moe_tp"), whole(table, "topk")
    divides(ep, "moe_ep", of_all, "num_experts")
    enough(top_k, "topk", of_all)
    hidden, inter = whole(table, "hidden_size"), whole(table, "inter_size")
    divides(tp, "moe_tp", inter, "inter_size")
    loads = [_pattern(*key) for key in _tuples(tokens, top_k, of_all, ep, _distributions(table))]
    measured, patterns = seconds(table), _distributions(table)
    same = [libraries(table), formats(table), of_all, tp, top_k, patterns, gpus(table)]
    same += [hidden, inter]
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
                hidden,
                inter / tp,
                top_k,
                tokens,
                tokens * top_k / of_all,
            ),
            measured,
            lines_of(table),
            doubt,
        )
    ]


def wide_layers(table: Table, file: str) -> list[Rows]:
    """wideep_moe_sglang.csv: DeepGEMM with masked rows (decode) and contiguous blocks of rows (prefill)."""
    of_all, ep, top_k = experts(table, "num_experts"), whole(table, "ep"), whole(table, "topk")
    tokens = _tokens(table, ep, "tokens_per_rank")
    divides(ep, "ep", of_all, "num_experts")
    enough(top_k, "topk", of_all)
    prefill = phases(table) == "prefill"
    patterns = _distributions(table)
    loads = []
    for n, k, e, ranks, pattern, blocks in _tuples(tokens, top_k, of_all, ep, patterns, prefill):
        even = pattern in ("uniform", "balanced")
        cut = blocks and even
        loads.append(block_counts(n * k / ranks, int(e // ranks)) if cut else _front(n, k, e, ranks, pattern))
    came = np.array([arriving(load, n) for load, n in zip(loads, tokens.tolist(), strict=True)])
    seen = np.where(prefill, tokens, came)
    library = np.where(prefill, "deepgemm_contiguous", "deepgemm_masked")
    columns = _columns(
        loads,
        whole(table, "hidden_size"),
        whole(table, "inter_size"),
        top_k,
        seen,
        tokens * top_k / of_all,
    )
    return [_rows(table, file, "experts", library, columns)]


def skewed_layers(table: Table, file: str) -> list[Rows]:
    """wideep_moe_skew_trtllm_h100.csv: the hottest rank, with the tokens that were counted there."""
    of_all, ep, top_k = experts(table, "num_experts"), whole(table, "ep"), whole(table, "topk")
    tokens = _tokens(table, ep, "tokens_per_dp_rank")
    slots = experts(table, "num_slots") if "num_slots" in table else of_all
    divides(ep, "ep", slots, "num_slots")
    enough(of_all, "num_experts", slots)
    enough(top_k, "topk", of_all)
    patterns = _distributions(table)
    # Only levelling makes copies of experts; without it each stands where it always did.
    copied = np.char.endswith(patterns, LEVELLED)
    divides(np.where(copied, 1.0, ep), "ep", of_all, "num_experts")
    loads = [_front(*key) for key in _tuples(tokens, top_k, of_all, ep, patterns, slots)]
    counted = "tokens_arriving_at_hot_rank"
    if counted in table:
        came = positive(table, counted)
        enough(came, counted, tokens)
        loads = [scaled_to_arrivals(*one) for one in zip(loads, tokens.tolist(), came.tolist(), strict=True)]
    else:
        came = np.array([arriving(load, n) for load, n in zip(loads, tokens.tolist(), strict=True)])
    columns = _columns(
        loads,
        whole(table, "hidden_size"),
        whole(table, "inter_size"),
        top_k,
        came,
        tokens * top_k / slots,
    )
    return [_rows(table, file, "experts", np.full(len(tokens), "trtllm_wide"), columns)]


def single_products(table: Table, file: str) -> list[Rows]:
    """infersim_h800_grouped_gemm.csv: both grouped products by themselves, every expert equally loaded."""
    held, top_k, tokens = _local(table), whole(table, "topk"), positive(table, "tokens_per_gpu")
    each = positive(table, "tokens_per_expert") if "tokens_per_expert" in table else tokens * top_k / held
    loads = [np.full(int(g), t) for g, t in zip(held.tolist(), each.tolist(), strict=True)]
    hidden, inter = whole(table, "hidden_size"), whole(table, "intermediate_size")
    columns = _columns(loads, hidden, inter, top_k, tokens)
    decode = phases(table) == "decode"
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
    tokens = whole(table, "num_tokens_on_this_rank", most=_MOST_DRAWN)
    held, top_k, tp = (
        _local(table, "local_experts", "moe_ep"),
        whole(table, "topk"),
        whole(table, "moe_tp"),
    )
    ep = whole(table, "moe_ep") if "moe_ep" in table else np.ones(len(held))
    enough(top_k, "topk", held * ep)
    inter = whole(table, "inter_size")
    divides(tp, "moe_tp", inter, "inter_size")
    loads = [random_counts(*key) for key in _tuples(tokens, top_k, held, ep)]
    columns = _columns(loads, whole(table, "hidden_size"), inter / tp, top_k, tokens)
    context = column(table, "context") if "context" in table else np.full(len(tokens), "")
    eager = (context == "standalone_legacy") & (tokens < _EAGER)
    doubt = np.where(eager, "about 0.2 ms of eager launches are in it", "")
    rows = _rows(table, file, "experts", np.full(len(tokens), "vllm"), columns, "grouped_gemm_us")
    return [replace(rows, left_out=doubt)]


def forced_layers(table: Table, file: str) -> list[Rows]:
    """rtxpro6000_vllm_kernels.csv, its fused layers: tokens spread evenly over a given number of experts."""
    at = rows_of_kind(table, "fused_moe_forced_routing")
    if not len(at):
        return []
    tokens, used = whole(table, "tokens", at), whole(table, "activated_experts", at)
    model, tp = model_widths(table, at), whole(table, "tp", at)
    enough(used, "activated_experts", model["experts"], at)
    enough(model["top_k"], "a token's experts", used, at)
    divides(tp, "tp", model["expert_inter"], "width of an expert", at)
    loads = [
        np.pad(np.full(int(a), n * k / a), (0, int(e - a)))
        for n, k, e, a in _tuples(tokens, model["top_k"], model["experts"], used)
    ]
    columns = _columns(loads, model["hidden"], model["expert_inter"] / tp, model["top_k"], tokens)
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


def _tokens(table: Table, ep: np.ndarray, per_rank: str) -> np.ndarray:
    """float64[N] tokens of the whole group, by those of each rank where the file does not state them."""
    if "num_tokens_global" in table or per_rank not in table:
        return whole(table, "num_tokens_global")
    return np.asarray(whole(table, per_rank) * ep)


def _local(table: Table, name: str = "num_local_experts", of: str = "ep") -> np.ndarray:
    """float64[N] experts of a rank, by those of all and the ranks where the file does not state them."""
    if not {"num_experts", of} <= set(table):
        return experts(table, name)
    of_all, ep = experts(table, "num_experts"), whole(table, of)
    divides(ep, of, of_all, "num_experts")
    held: np.ndarray = of_all / ep
    if name in table:
        stated = experts(table, name)
        wrong = stated != held
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ClustersimError(
                f"line {line_of(row, None)}: {name} = {stated[row]:.0f} is not "
                f"num_experts / {of} = {held[row]:.0f}"
            )
    return held


def _distributions(table: Table) -> np.ndarray:
    """str[N] load patterns; balanced in a file that names none."""
    if "distribution" not in table:
        return np.full(len(lines_of(table)), "balanced")
    texts = [str(text).strip().lower() for text in column(table, "distribution").tolist()]
    patterns = np.array(texts, dtype=str)
    for pattern in np.unique(patterns).tolist():
        if not known_load(pattern):
            line = int(np.argmax(patterns == pattern)) + 2
            raise ClustersimError(
                f'line {line}: distribution = "{pattern}" is no known load; there are {LOADS}'
            )
    return patterns


def _tuples(*columns: np.ndarray) -> list[tuple[Any, ...]]:
    return list(zip(*(c.tolist() for c in columns), strict=True))


@lru_cache(_KEPT)
def _pattern(tokens: float, top_k: float, experts: float, ep: float, pattern: str) -> np.ndarray:
    return hot_rank_counts(int(tokens), int(top_k), int(experts), int(ep), pattern)


@lru_cache(_KEPT)
def _front(
    tokens: float, top_k: float, experts: float, ep: float, pattern: str, slots: float = 0
) -> np.ndarray:
    return hot_rank_counts(int(tokens), int(top_k), int(experts), int(ep), pattern, int(slots), front=True)


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
