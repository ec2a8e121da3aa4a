"""Measured rows of attention, from the tables of five sources to calls; and where fits of them begin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.spec.kernel_tables import TableKey
from clustersim.spec.model import FORMAT_BYTES
from clustersim.study.kernel_rows import (
    Rows,
    divides,
    doubts,
    enough,
    formats,
    gpus,
    kept_formats,
    libraries,
    line_of,
    lines_of,
    phases,
    seconds,
    shares,
    taken,
    whole,
)
from clustersim.study.layer_profiles import model_widths, rows_of_kind
from clustersim.study.least_squares import Parameter
from clustersim.study.measured import Table

#: What attention is called in rtxpro6000_vllm_kernels, column `kind`.
_MIXED = "attention_mixed_batch"


def prompts(table: Table, file: str = "attn_prefill") -> list[Rows]:
    """Prompts of equal length with nothing cached: columns batch_size, isl."""
    batch, length = whole(table, "batch_size"), whole(table, "isl")
    return [_rows(file, "attention_prefill", table, _chunks(batch, length, np.zeros(len(batch))))]


def chunks(table: Table, file: str = "frontier_h800_attention_chunked") -> list[Rows]:
    """Chunks of prompts after earlier ones: columns batch_size, new_tokens, prior_kv_tokens; by `phase`, if
    there is such a column, new tokens of sequences instead."""
    batch, new = whole(table, "batch_size"), whole(table, "new_tokens")
    prior = whole(table, "prior_kv_tokens", least=0)
    rows = _rows(file, "attention_prefill", table, _chunks(batch, new, prior), "flashinfer")
    decode = phases(table) == "decode" if "phase" in table else np.zeros(len(batch), dtype=bool)
    enough(np.where(decode, new, 1.0), "new_tokens", np.ones(len(batch)))
    parts = [taken(rows, ~decode), taken(replace(rows, kernel="attention_decode"), decode)]
    return [part for part in parts if len(part)]


def new_tokens(table: Table, file: str = "attn_decode") -> list[Rows]:
    """One new token in each of equal sequences: columns batch_size, kv_len."""
    batch = whole(table, "batch_size")
    columns = _chunks(batch, np.ones(len(batch)), whole(table, "kv_len") - 1.0)
    # InferSim's README does not name its kernel. No time of its table is below some 26 us, since launches
    # are inside the timer: a library of its own keeps that out of all other prices. Its files can be told by
    # what they call the format of the cache.
    return [_rows(file, "attention_decode", table, columns, "infersim" if "kv_dtype" in table else "")]


def mixed(table: Table, file: str = "rtxpro6000_vllm_kernels") -> list[Rows]:
    """Chunk of a prompt and new tokens of other sequences in one call: columns model, tp, prefill_chunk,
    kv_prefill, n_decode, kv_decode; where only one of them is there, a prefill or decode like any other.
    """
    here = rows_of_kind(table, _MIXED)
    if not len(here):
        return []
    new, prior, others, length = (
        whole(table, name, here, least=0) for name in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    )
    decode = {"decode_sequences": others, "decode_context": others * length}
    batch = {**_chunks(np.minimum(new, 1.0), new, prior), **decode}
    model, tp = model_widths(table, here), whole(table, "tp", here)
    divides(tp, "tp", model["heads"], "attention heads", here)
    shares(tp, "tp", model["kv_heads"], "KV heads", here)
    columns = {
        **batch,
        "heads": model["heads"] / tp,
        "kv_heads": np.maximum(model["kv_heads"] / tp, 1.0),
        "head_dim": model["head_dim"],
        "kv_bytes": np.full(len(here), 2.0),
    }
    rows = Rows(
        file=file,
        kernel="attention_mixed",
        gpu=gpus(table, here),
        library=np.full(len(here), "vllm"),
        format=np.full(len(here), "bf16"),
        columns=columns,
        measured=seconds(table, at=here),
        row=here,
        left_out=doubts(table, here),
    )
    idle = (new == 0) & (others == 0)
    if idle.any():
        raise ClustersimError(
            f"line {line_of(int(np.argmax(idle)), here)}: prefill_chunk and n_decode are both 0"
        )
    ones = {**columns, **_chunks(others, np.ones(len(here)), np.maximum(length, 1.0) - 1.0)}
    parts = [
        taken(rows, (new > 0) & (others > 0)),
        taken(replace(rows, kernel="attention_prefill", columns=_without(columns, decode)), others == 0),
        taken(replace(rows, kernel="attention_decode", columns=_without(ones, decode)), new == 0),
    ]
    return [part for part in parts if len(part)]


def _without(columns: Mapping[str, np.ndarray], others: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: values for name, values in columns.items() if name not in set(others)}


def _chunks(batch: np.ndarray, new: np.ndarray, prior: np.ndarray) -> dict[str, np.ndarray]:
    """The sums over `batch` sequences with so many new and earlier tokens each."""
    return {
        "sequences": batch,
        "tokens": batch * new,
        "pairs": batch * new * (prior + (new + 1.0) / 2),
        "context": batch * np.where(new > 0, prior + new, 0.0),
    }


def _rows(file: str, kernel: str, table: Table, columns: Mapping[str, np.ndarray], unnamed: str = "") -> Rows:
    """Rows whose heads and formats stand in columns.

    unnamed  library of rows for which the file does not state one
    """
    heads, kv_heads = whole(table, "num_heads"), whole(table, "num_kv_heads")
    divides(kv_heads, "num_kv_heads", heads, "num_heads")
    called = "attn_dtype" if "kv_cache_dtype" in table else "dtype"
    form = formats(table, next((name for name in ("attn_dtype", "dtype") if name in table), called))
    kv_form = kept_formats(table, ("kv_cache_dtype", "kv_dtype"), form)
    named = libraries(table)
    return Rows(
        file=file,
        kernel=kernel,
        gpu=gpus(table),
        library=np.where(named == "", unnamed, named),
        format=form,
        columns={
            **columns,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": whole(table, "head_dim"),
            "kv_bytes": np.array([FORMAT_BYTES[name] for name in kv_form.tolist()], dtype=float),
        },
        measured=seconds(table),
        row=lines_of(table),
        left_out=doubts(table),
    )


#: Where the fit of a prefill begins, and between which bounds it stays. `reach` and `softmax` can be told
#: apart only where two widths of numbers were measured, so `reach` is held: with the exponentials' rate of
#: the data sheet it then comes out alike for bf16 and fp8 on the H100.
PREFILL_START = {
    "launch": Parameter(10e-6, 1e-6, 60e-6),
    "quantise": Parameter(2e-6, 0.01e-6, 20e-6, prior=0.5),
    "traffic": Parameter(0.7, 0.1, 1.5),
    "reach": Parameter(0.85, 0.3, 1.0, prior=0.3),
    "softmax": Parameter(0.8, 0.05, 3.0, prior=0.5),
    "tile": Parameter(2e-6, 0.01e-6, 10e-6),
    "narrow_tile": Parameter(2.0, 0.5, 5.0, prior=0.5),
    "waves": Parameter(0.7, 0.05, 1.0),
    "longest": Parameter(0.9, 0.05, 2.0),
}

#: The same of chunks and new tokens in one call.
MIXED_START = {**PREFILL_START, "again": Parameter(2.0, 0.1, 20.0, prior=1.0)}

#: The same of a decode. What only MHA or a narrow cache tells is held at what the H100 says.
DECODE_START = {
    "launch": Parameter(5e-6, 0.5e-6, 60e-6),
    "lone_launch": Parameter(7e-6, 0.5e-6, 60e-6, prior=0.5),
    "item": Parameter(3e-6, 0.05e-6, 20e-6),
    "lone_item": Parameter(2e-6, 0.05e-6, 20e-6, prior=0.5),
    "narrow_item": Parameter(0.5, 0.05, 2.0, prior=0.5),
    "stream": Parameter(3.0, 0.1, 10.0, prior=1.0),
    "lone_stream": Parameter(1.5, 0.1, 10.0, prior=1.0),
    "chunk": Parameter(250.0, 32.0, 8192.0, prior=1.0),
    "lone_chunk": Parameter(250.0, 32.0, 8192.0, prior=1.0),
    "gather": Parameter(2e-6, 0.001e-6, 20e-6),
    "narrow_gather": Parameter(0.5, 0.05, 2.0, prior=0.5),
    "merge": Parameter(0.05e-6, 0.0001e-6, 1e-6),
    "regroup": Parameter(0.2e-6, 0.001e-6, 20e-6),
    "bandwidth": Parameter(0.92, 0.4, 1.0),
    "cache": Parameter(0.8, 0.1, 2.0, prior=0.2),
    "cached": Parameter(1.5, 1.0, 6.0),
    "cold": Parameter(5e-6, 0.01e-6, 40e-6),
    "reach": Parameter(0.5, 0.1, 1.0, prior=0.3),
}

#: vLLM on GPUs without FlashAttention-3: FlashAttention-2 cuts KV into parts only where it has turned the
#: heads of a group into rows. Source: mha_varlen_fwd of flash-attention, csrc/flash_attn/flash_api.cpp.
NEVER = 1e9
_FLASH_ATTENTION_2 = ("a100_sxm", "a800_sxm", "rtx_pro_6000")


def prefill_start(key: TableKey) -> Mapping[str, Parameter]:
    """Where the fit of a prefill table's parameters begins."""
    return {**PREFILL_START, "rows": _tile_rows(key)}


def mixed_start(key: TableKey) -> Mapping[str, Parameter]:
    """Where the fit of the parameters of a table of both in one call begins."""
    return {**MIXED_START, "rows": _tile_rows(key)}


def _tile_rows(key: TableKey) -> Parameter:
    """Which of 64 and 128 rows it is was chosen by the error of the fit; only the RTX PRO 6000 wants 64."""
    rows = 64.0 if key.gpu == "rtx_pro_6000" else 128.0
    return Parameter(rows, rows, rows)


def decode_start(key: TableKey) -> Mapping[str, Parameter]:
    """Where the fit of a decode table's parameters begins."""
    if key.library == "vllm" and key.gpu in _FLASH_ATTENTION_2:
        return {**DECODE_START, "lone_chunk": Parameter(NEVER, NEVER, NEVER)}
    return DECODE_START


#: Measured table → its reader.
READERS = {
    "attn_prefill": prompts,
    "attn_decode": new_tokens,
    "infersim_h800_gqa_decode": new_tokens,
    "frontier_h800_attention_chunked": chunks,
    "rtxpro6000_vllm_kernels": mixed,
}

#: Kernel → where its fits begin.
STARTS = {
    "attention_prefill": prefill_start,
    "attention_decode": decode_start,
    "attention_mixed": mixed_start,
}
