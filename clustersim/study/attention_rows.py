"""Measured rows of attention, from the tables of five sources to calls; and where fits of them begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from clustersim.spec.model import FORMAT_BYTES
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
from clustersim.study.least_squares import Parameter
from clustersim.study.measured import Table

#: Library of a table that has no column for it. Its README does not name the kernel of InferSim's decode rows.
INFERSIM, FRONTIER, RTX = "infersim", "flashinfer", "vllm"

#: Query heads, KV heads and head dimension of the models of rtxpro6000_vllm_kernels before tensor parallelism.
#: Source: their config.json on Hugging Face.
_MODELS = {
    "Qwen3-30B-A3B": (32.0, 4.0, 128.0),
    "Qwen3-32B": (64.0, 8.0, 128.0),
    "Llama-3.1-8B": (32.0, 8.0, 128.0),
}


def attn_prefill(table: Table) -> Rows:
    """Prompts of equal length, nothing cached."""
    batch, length = whole(table, "batch_size"), whole(table, "isl")
    columns = {
        "sequences": batch,
        "tokens": batch * length,
        "pairs": batch * length * (length + 1.0) / 2,
        "context": batch * length,
    }
    return _rows("attn_prefill", "attention_prefill", table, columns)


def attn_decode(table: Table) -> Rows:
    """One new token in each of equal sequences."""
    return _decode("attn_decode", table)


def infersim_h800_gqa_decode(table: Table) -> Rows:
    """The same on H800, with the launch inside the timer: no time is below some 26 us."""
    return _decode("infersim_h800_gqa_decode", table, INFERSIM)


def frontier_h800_attention_chunked(table: Table) -> Rows:
    """Chunks of a prompt after earlier ones."""
    batch = whole(table, "batch_size")
    new, prior = whole(table, "new_tokens"), whole(table, "prior_kv_tokens", least=0)
    columns = {
        "sequences": batch,
        "tokens": batch * new,
        "pairs": batch * new * (prior + (new + 1.0) / 2),
        "context": batch * (prior + new),
    }
    return _rows("frontier_h800_attention_chunked", "attention_prefill", table, columns, FRONTIER)


def _decode(file: str, table: Table, library: str = "") -> Rows:
    batch, length = whole(table, "batch_size"), whole(table, "kv_len")
    context = batch * length
    columns = {"sequences": batch, "tokens": batch, "pairs": context, "context": context}
    return _rows(file, "attention_decode", table, columns, library)


def _rows(
    file: str, kernel: str, table: Table, columns: Mapping[str, np.ndarray], library: str = ""
) -> Rows:
    """Rows whose heads and formats stand in columns."""
    heads, kv_heads = whole(table, "num_heads"), whole(table, "num_kv_heads")
    form = formats(table, "attn_dtype" if "attn_dtype" in table else "dtype")
    kv = next((name for name in ("kv_cache_dtype", "kv_dtype") if name in table), None)
    kv_form = form if kv is None else formats(table, kv)
    lines = lines_of(table)
    named = libraries(table)
    return Rows(
        file=file,
        kernel=kernel,
        gpu=gpus(table),
        library=np.where(named == "", library, named),
        format=form,
        columns={
            **columns,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": whole(table, "head_dim"),
            "kv_bytes": np.array([FORMAT_BYTES[name] for name in kv_form.tolist()], dtype=float),
        },
        measured=seconds(table),
        row=lines,
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
    "waves": Parameter(0.7, 0.05, 1.0),
    "longest": Parameter(0.9, 0.05, 2.0),
}

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
#: heads of a group into rows. Source: set_params_splitkv in mha_varlen_fwd of flash-attention's flash_api.cpp.
NEVER = 1e9
_FLASH_ATTENTION_2 = ("a100_sxm", "a800_sxm", "rtx_pro_6000")


def start_of(kernel: str, gpu: str, library: str) -> Mapping[str, Parameter]:
    """Where the fit of the parameters of a table begins.

    kernel   attention_prefill or attention_decode
    gpu      name in the catalogue
    library  as in Rows
    """
    if kernel == "attention_prefill":
        return PREFILL_START
    if library == "vllm" and gpu in _FLASH_ATTENTION_2:
        return {**DECODE_START, "lone_chunk": Parameter(NEVER, NEVER, NEVER)}
    return DECODE_START
