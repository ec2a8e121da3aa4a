"""Rows of dense products [m, k] x [k, n], from every table that has some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from clustersim.spec.gpus import gpu_named
from clustersim.spec.kernel_tables import TableKey
from clustersim.spec.model import FORMAT_BYTES
from clustersim.study import layer_profiles
from clustersim.study.kernel_rows import (
    Rows,
    column,
    doubts,
    formats,
    gpus,
    libraries,
    lines_of,
    seconds,
    whole,
)
from clustersim.study.layer_profiles import PRODUCTS, Profile, per_layer, rows_of_layers
from clustersim.study.least_squares import Parameter
from clustersim.study.measured import Table

#: A product of many tokens that takes so many times as long per token as the same product of more tokens.
_THROTTLED_FROM = 4096
_THROTTLED_BY = 1.15
_THROTTLED = "throttled: more tokens of the same product took less time each"

#: Weights of one layer, timed over and over, stay in L2; in a model of many layers they do not.
_FROM_L2 = "weights came from L2: faster than HBM delivers them"
#: A product that took less than so many times what HBM needs for its weights is ruled by reading them.
_READING = 2.0


def products(table: Table, file: str = "gemm_trtllm") -> list[Rows]:
    """Columns gpu, dtype, m, n, k; framework and time_us if there are any.

    dtype may bear a remark in brackets; one that names DeepGEMM means its fp8, which is scaled by blocks.
    Raises   ClustersimError with the line of a wrong row
    """
    words = [str(text).partition("(") for text in column(table, "dtype").tolist()]
    bare = {**table, "dtype": np.array([word.strip() for word, _, _ in words], dtype=str)}
    number_format = formats(bare)
    deepgemm = np.array(["deepgemm" in remark.lower() for _, _, remark in words], dtype=bool)
    return [
        Rows(
            file=file,
            kernel="gemm",
            gpu=gpus(table),
            library=np.where(deepgemm, "deepgemm", libraries(table)),
            format=np.where(deepgemm & (number_format == "fp8"), "fp8_block", number_format),
            columns={name: whole(table, name) for name in ("m", "n", "k")},
            measured=seconds(table),
            row=lines_of(table),
            left_out=doubts(table),
        )
    ]


def of_layers(profile: Profile) -> list[Rows]:
    """The dense products among the layers of a profile."""
    m = profile.widths["tokens"]
    n, k, any_here = np.zeros(len(m)), np.zeros(len(m)), np.zeros(len(m), dtype=bool)
    for layer, work in PRODUCTS.items():
        if (profile.layer == layer).any():
            here, some_n, some_k = per_layer(profile, layer, work)
            n, k, any_here = n + some_n, k + some_k, any_here | here
    if not any_here.any():
        return []
    rows = rows_of_layers(profile, "gemm", any_here, {"m": m, "n": n, "k": k})
    reasons = np.select([_from_l2(rows), _throttled(rows)], [_FROM_L2, _THROTTLED], default=rows.left_out)
    return [replace(rows, left_out=reasons)]


def _from_l2(rows: Rows) -> np.ndarray:
    """bool[N] of rows ruled by reading weights, of products that show themselves faster than HBM."""
    n, k = rows.columns["n"], rows.columns["k"]
    number = np.array([FORMAT_BYTES[form] for form in rows.format.tolist()])
    bandwidth = np.array([gpu_named(gpu).memory_bandwidth for gpu in rows.gpu.tolist()])
    read = n * k * number / bandwidth
    marked = np.zeros(len(n), dtype=bool)
    for gpu, *shape in sorted(set(zip(rows.gpu.tolist(), n.tolist(), k.tolist(), strict=True))):
        same = (rows.gpu == gpu) & (n == shape[0]) & (k == shape[1])
        if (rows.measured[same] < read[same]).any():
            marked |= same & (rows.measured < _READING * read)
    return marked


def _throttled(rows: Rows) -> np.ndarray:
    """bool[N] of rows that the power limit slowed down more than those of more tokens: by what ran before
    them, and not by their own doing."""
    m, n, k = (rows.columns[name] for name in ("m", "n", "k"))
    per_token = rows.measured / m
    slowed = np.zeros(len(m), dtype=bool)
    for shape in sorted(set(zip(n.tolist(), k.tolist(), strict=True))):
        curve = np.flatnonzero((n == shape[0]) & (k == shape[1]) & (m >= _THROTTLED_FROM))
        for one in curve:
            more = curve[m[curve] > m[one]]
            slowed[one] = bool((per_token[one] > _THROTTLED_BY * per_token[more]).any())
    return slowed


def _reader(name: str) -> Callable[..., list[Rows]]:
    read_profile = layer_profiles.PROFILES[name]

    def read(table: Table, file: str = name) -> list[Rows]:
        """Products among the layers in a table of this form. Raises ClustersimError with the line of a wrong
        row."""
        return of_layers(read_profile(table, file))

    return read


#: Measured table → its reader: (table, file) to rows.
READERS: dict[str, Callable[..., list[Rows]]] = {
    "gemm_trtllm": products,
    "gemm_vllm_h100": products,
    "infersim_h800_gemm": products,
    **{name: _reader(name) for name in layer_profiles.PROFILES},
}

_START = {
    "launch": Parameter(3e-6, 1e-7, 3e-4),
    "reach": Parameter(0.8, 0.1, 2.0),
    "bandwidth": Parameter(0.8, 0.1, 1.0),
    "in_flight": Parameter(1e6, 1e4, 1e8),
    "overlap": Parameter(3.0, 1.0, 6.0),
    "depth": Parameter(100.0, 10.0, 1000.0),
    "small_tile": Parameter(0.1, 0.01, 1.0),
    "last_wave": Parameter(0.6, 0.05, 1.0),
    "throttle": Parameter(0.05, 0.001, 1.0),
    "stream": Parameter(3.0, 1.0, 20.0),
    "quantise": Parameter(1.0, 0.1, 10.0),
}


#: Formats whose products are DeepGEMM's in every library here: it never cuts the inner dimension.
_WHOLE_DEPTH = ("fp8_block",)


def _start(key: TableKey) -> Mapping[str, Parameter]:
    parts = 1.0 if key.format in _WHOLE_DEPTH else 16.0
    return {**_START, "parts": Parameter(parts, parts, parts)}


STARTS = {"gemm": _start}
