"""Measured rows of latent attention: the kernel alone and the whole module, prefill and decode.

All rows are of DeepSeek-V3's attention, on one rank of a tensor-parallel group: heads differ, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.physics.kernels import LIBRARIES
from clustersim.spec.kernel_tables import TableKey
from clustersim.study.kernel_rows import (
    MOST,
    Rows,
    column,
    doubts,
    entries,
    formats,
    gpus,
    kept_formats,
    libraries,
    line_of,
    phases,
    seconds,
    whole,
)
from clustersim.study.least_squares import Parameter
from clustersim.study.measured import Table

#: Sizes of DeepSeek-V3's attention. Source: arXiv 2412.19437, section 4.2.
SIZES = {"kv_rank": 512.0, "rope_dim": 64.0, "nope_dim": 128.0, "v_dim": 128.0}
MODULE_SIZES = {"hidden": 7168.0, "q_rank": 1536.0}

_HEADS = re.compile(r"(\d{1,13}) heads")
_SCOPES = {"kernel": "", "module": "_module"}
#: Longer than this many times the same call with twice the tokens is no measurement of that call.
_ABSURD = 2.0
_ABSURD_SAYS = "takes more than twice as long as the same call with twice the tokens"


def call_columns(
    phase: str, heads: np.ndarray, batch: np.ndarray, length: np.ndarray, kv_bytes: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns of kernel calls for sequences of equal length.

    phase    prefill: length new tokens each, none before; decode: one new token on length KV tokens
    """
    prefill = phase == "prefill"
    pairs = length * (length + 1) / 2 if prefill else length
    one = np.ones(len(heads))
    return {
        "sequences": batch,
        "tokens": batch * length if prefill else batch,
        "pairs": batch * pairs,
        "context": batch * length,
        "heads": heads,
        **{name: size * one for name, size in SIZES.items()},
        "kv_bytes": kv_bytes * one,
    }


def mla_rows(table: Table, file: str) -> list[Rows]:
    """Rows of the form of `mla.csv`.

    Raises  ClustersimError naming the line and value of what cannot be read
    """
    running = phases(table)
    scopes = (
        np.array(entries(table, "scope", _SCOPES, "scope")) if "scope" in table else np.full(len(running), "")
    )
    found = []
    for scope in ("", "_module"):
        for phase in ("prefill", "decode"):
            at = np.flatnonzero((running == phase) & (scopes == scope))
            if len(at):
                found.append(_rows(table, file, phase, scope, at))
    return found


def _rows(table: Table, file: str, phase: str, scope: str, at: np.ndarray) -> Rows:
    library = _libraries(table, at)
    narrow = _narrow(table, at)
    columns = call_columns(
        phase,
        whole(table, "num_heads", at),
        whole(table, "batch_size", at),
        whole(table, "seq_len", at),
        np.where(narrow, 1.0, 2.0),
    )
    if scope:
        weights = kept_formats(table, ("gemm_type",), np.full(len(at), "fp8_block"), at)
        columns |= {name: np.full(len(at), size) for name, size in MODULE_SIZES.items()}
        columns["weight_bytes"] = np.where(weights == "bf16", 2.0, 1.0)
    rows = Rows(
        file,
        f"mla_{phase}{scope}",
        gpus(table, at),
        library,
        np.where(narrow, "fp8", "bf16"),
        columns,
        seconds(table, at=at),
        at,
        doubts(table, at),
    )
    return _doubtful(rows, whole(table, "seq_len", at))


def _libraries(table: Table, at: np.ndarray) -> np.ndarray:
    """SGLang calls kernels of others and says which; they are what was timed. Other sources, such as
    "trtllm_default", are the framework's own choice."""
    frameworks = libraries(table, at)
    if "kernel_source" not in table:
        return frameworks
    sources = [str(text).strip().lower() for text in column(table, "kernel_source", at).tolist()]
    own = [text not in LIBRARIES for text in sources]
    return np.where(own, frameworks, np.array(sources, dtype=str))


def _narrow(table: Table, at: np.ndarray) -> np.ndarray:
    """bool[N] whether KV rows, and with them the attention, are fp8.

    Rows of SGLang say fp8, but each KV token costs as much as TensorRT-LLM's in bf16 (0.39 and 0.36 ns
    with 16 heads on an H100, where HBM allows 0.34 in bf16 and 0.17 in fp8): the cache was bf16.
    """
    own = kept_formats(table, ("mla_dtype",), np.full(len(at), ""), at)
    kept = kept_formats(table, ("kv_cache_dtype", "kv_dtype"), own, at)
    if (kept == "").any():
        formats(table, "kv_cache_dtype", at)
    narrow = kept != "bf16"
    return np.asarray(narrow & ~np.isin(libraries(table, at), ["sglang"]))


def _doubtful(rows: Rows, length: np.ndarray) -> Rows:
    """The rows, those left out that take longer by _ABSURD than the same call with twice the tokens."""
    keys = [rows.gpu, rows.library, rows.format, rows.columns["heads"], rows.columns["sequences"], length]
    made = list(zip(*(key.tolist() for key in keys), strict=True))
    taken = dict(zip(made, rows.measured.tolist(), strict=True))
    twice = np.array([taken.get((*call[:-1], 2.0 * call[-1]), np.nan) for call in made])
    absurd = rows.measured > _ABSURD * twice
    return replace(rows, left_out=np.where((rows.left_out == "") & absurd, _ABSURD_SAYS, rows.left_out))


def infersim_mla_rows(table: Table, file: str) -> list[Rows]:
    """Rows of the form of `infersim_h800_mla.csv`, whose heads stand in the text of column `kernel`.

    Raises  ClustersimError naming the line and value of what cannot be read
    """
    running = phases(table)
    return [
        _infersim(table, file, phase, np.flatnonzero(running == phase))
        for phase in ("prefill", "decode")
        if (running == phase).any()
    ]


def _infersim(table: Table, file: str, phase: str, at: np.ndarray) -> Rows:
    form = formats(table, "dtype", at)
    narrow = kept_formats(table, ("kv_dtype", "kv_cache_dtype"), form, at) != "bf16"
    columns = call_columns(
        phase,
        whole(table, "num_heads", at) if "num_heads" in table else _heads(table, at),
        whole(table, "batch_size", at),
        whole(table, "kv_len", at),
        np.where(narrow, 1.0, 2.0),
    )
    return Rows(
        file,
        f"mla_{phase}",
        gpus(table, at),
        libraries({"framework": table["kernel"]} if "kernel" in table else table, at),
        form,
        columns,
        seconds(table, at=at),
        at,
        doubts(table, at),
    )


def _heads(table: Table, at: np.ndarray) -> np.ndarray:
    """float64[M] from texts such as "FlashInfer MLA decode (absorbed; 128 heads, kv_lora 512, rope 64)"."""
    texts = [str(text) for text in column(table, "kernel", at).tolist()]
    found = [_HEADS.search(text) for text in texts]
    for place, (match, text) in enumerate(zip(found, texts, strict=True)):
        if match is None or not 1 <= int(match[1]) <= MOST:
            raise ClustersimError(
                f"line {line_of(place, at)}: kernel = {text[:60] or 'nothing'} does not say how many heads, "
                'as in "128 heads"; a column num_heads serves as well'
            )
    return np.array([float(match[1]) for match in found if match])


#: Parameter → start, bounds, and how far it may leave its start where rows say little: with few heads none
#: of them says how fast arithmetic is, with many none how fast memory is.
_PREFILL = {
    "launches": Parameter(4.5, 0.5, 40.0, prior=3.0),
    "merging": Parameter(0.1, 1e-3, 5.0, prior=3.0),
    "arithmetic": Parameter(0.7, 0.05, 1.5, prior=3.0),
    "traffic": Parameter(0.7, 0.05, 1.0, prior=1.0),
    "throttle": Parameter(0.2, 1e-3, 1.0, prior=3.0),
}
_DECODE = {
    "launches": Parameter(3.8, 0.5, 40.0, prior=3.0),
    "merging": Parameter(0.4, 1e-3, 5.0, prior=3.0),
    "arithmetic": Parameter(0.7, 0.05, 1.5, prior=3.0),
    "memory": Parameter(0.87, 0.1, 1.0, prior=0.5),
    "traffic": Parameter(0.4, 0.02, 1.0, prior=1.0),
}
_PROJECTIONS = {
    "launches": Parameter(12.0, 1.0, 60.0, prior=10.0),
    "arithmetic": Parameter(0.7, 0.05, 1.5, prior=1.5),
    "projection": Parameter(0.65, 0.05, 1.0, prior=0.5),
    "weights": Parameter(0.75, 0.1, 1.0, prior=0.5),
    "passes": Parameter(1.5, 0.01, 10.0),
}
_STARTS: dict[str, Mapping[str, Parameter]] = {
    "mla_prefill": _PREFILL,
    "mla_decode": {**_DECODE, "resident": Parameter(1e-5, 1e-7, 1e-4, prior=3.0)},
    "mla_prefill_module": {**_PREFILL, **_PROJECTIONS, "host": Parameter(3e-4, 1e-6, 2e-3)},
    "mla_decode_module": {**_DECODE, **_PROJECTIONS},
}


def _start(key: TableKey) -> Mapping[str, Parameter]:
    return _STARTS[key.kernel]


STARTS: dict[str, Callable[[TableKey], Mapping[str, Parameter]]] = dict.fromkeys(_STARTS, _start)
#: Measured table → reader.
READERS = {"mla": mla_rows, "infersim_h800_mla": infersim_mla_rows}
