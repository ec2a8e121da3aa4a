"""Measured tables of the catalogue: what was timed on real hardware, as its source printed it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np

from clustersim.errors import pick
from clustersim.trace.files import read_columns

#: Column → int64[N], float64[N] (NaN where the source has a gap) or str[N] ("" for a gap).
Table: TypeAlias = Mapping[str, np.ndarray]

#: Where the tables lie, one `<name>.parquet` each; README.md beside them says where they come from.
FOLDER = Path(__file__).resolve().parent.parent / "catalogue" / "measured"

#: Table → what it holds. `python -m clustersim.study.pack` makes the files anew.
MEASURED = {
    "nccl_intranode": "NCCL collectives and alltoall in one NVLink domain, 2 to 8 GPUs",
    "collectives_published": "published nccl-tests output, one server to a rack and beyond",
    "custom_allreduce": "one-shot and two-shot all-reduce kernels of TensorRT-LLM, vLLM and SGLang",
    "nccl_tuning_constants": "constants of NCCL's own cost model",
    "network_point_measurements": "ib_write latency and bandwidth, NCCL floors of small messages",
    "deepep_low_latency_h100": "DeepEP low-latency dispatch and combine, EP8 to EP32",
    "deepep_low_latency_blackwell": "DeepEP low-latency dispatch and combine in one B200 or GB200 server",
    "deepep_normal_h100": "DeepEP normal dispatch and combine, EP8 to EP64",
    "moe_a2a_published": "published expert all-to-all times of several libraries, EP8 to EP128",
    "nvlink_a2a_gb200": "TensorRT-LLM NVLink all-to-all on GB200, EP2 to EP16",
    "simai_bw_ratio": "achieved share of link bandwidth by message size and scale",
    "vidur_network": "all_reduce and send_recv on A100 and H100 servers, 2 to 16 workers",
    "gemm_trtllm": "dense products in TensorRT-LLM, bf16, fp8 and fp8 with block scales: A100, H100, B200",
    "gemm_vllm_h100": "dense products in vLLM on H100",
    "infersim_h800_gemm": "dense fp8 products of DeepGEMM on H800",
    "infersim_h800_grouped_gemm": "grouped fp8 products of DeepGEMM by tokens per expert: H800, EP1–256",
    "moe_kernels": "fused MoE layers, balanced and power-law load: H100 and B200",
    "wideep_moe_sglang": "MoE layers of one rank of wide expert parallelism, DeepSeek's shape: H100 and B200",
    "wideep_moe_skew_trtllm_h100": "MoE layers on the hottest rank by tokens arriving there: H100, EP2–256",
    "frontier_a800_moe": "fused MoE of a Qwen3-30B-A3B layer on A800",
    "attn_prefill": "attention over prompts by batch, length and heads: A100, H100, B200",
    "attn_decode": "attention of one new token by batch, KV length and heads: A100, H100, B200",
    "mla": "MLA prefill and decode, kernel and whole module: H100 and B200",
    "infersim_h800_mla": "MLA prefill of FlashAttention-3 and absorbed decode of FlashInfer on H800",
    "infersim_h800_gqa_decode": "GQA decode on H800",
    "frontier_h800_attention_chunked": "attention of prompt chunks with earlier KV on H800",
    "frontier_h800_ops_405b": "every operator of Llama-3.1-405B but attention on H800, TP1 to TP8",
    "rtxpro6000_vllm_kernels": "layers of vLLM on RTX PRO 6000: dense, attention of mixed batches, fused MoE",
    "vidur_elementwise_ops": "embedding, norm, rotary, activation and add on A100 and H100",
    "kernel_peaks": "the highest rates that matrix products and FlashMLA have been seen to reach",
    "dsv3_train_profile_compute": "kernels of a DeepSeek-V3 training step on H800, by class",
    "megatron_moe_layer": "one MoE layer forward and backward on eight H100",
    "hw_specs": "data sheets of GPUs, and what links and memory were seen to reach",
}


@cache
def measured(name: str) -> Table:
    """The rows of a measured table; read once, not to be changed.

    name     a key of MEASURED
    Raises   ClustersimError that lists the tables there are; ResultError for a damaged file
    """
    pick(MEASURED, name, "measured table")
    columns = read_columns(FOLDER / f"{name}.parquet")
    for column in columns.values():
        column.setflags(write=False)
    return columns


def rows_of(table: Table, chosen: np.ndarray) -> Table:
    """The rows of a table at which chosen, bool[N] or int[M], says so."""
    return {name: column[chosen] for name, column in table.items()}
