"""Rows of strangers: what is wrong in a file of any form is told by its line, all else is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clustersim.cli import _status
from clustersim.errors import ClustersimError
from clustersim.physics.calibration import ORIGINS
from clustersim.physics.kernels import KERNELS, basis_of, price_calls
from clustersim.spec.formats import rate_key
from clustersim.spec.gpus import gpu_named, siblings
from clustersim.spec.hardware import Gpu
from clustersim.spec.reading import read_catalogue
from clustersim.study.forms import TOLD
from clustersim.study.kernel_families import READERS, measured_rows
from clustersim.study.kernel_rows import libraries, taken
from clustersim.study.measured import measured
from clustersim.study.price_flags import price_flags
from clustersim.study.price_rows import price_file

Columns = dict[str, list[str]]

#: What is no size, in a column of sizes.
NO_SIZES = ("-3", "0", "2.5", "nan", "", "inf", "1e13", "many", "1e999", "0x10")
#: What is no word of a table of words.
NO_WORDS = ("fp9", "", "7", "nan", "a\tb")

#: Column → what a row may not say there.
SPOILT: dict[str, tuple[str, ...]] = {
    "gpu": ("H10000", "", "nan"),
    **dict.fromkeys(("dtype", "attn_dtype", "quant"), (*NO_WORDS, "int8_wo", "int4")),
    **dict.fromkeys(("kv_cache_dtype", "kv_dtype", "mla_dtype"), ("fp9", "7", "w4a16")),
    **dict.fromkeys(("op", "layer", "kind", "phase", "scope"), NO_WORDS),
    "distribution": ("", "powerlaw", "power_law_-1", "zipf"),
    "model": ("GPT-9", "", "DeepSeek-V3"),
    "kernel": ("", "FlashInfer", "0 heads", "99999999999999 heads"),
    "prior_kv_tokens": tuple(bad for bad in NO_SIZES if bad != "0"),
    **dict.fromkeys(("tokens_arriving_at_hot_rank", "tokens_per_expert"), ("-3", "0", "", "inf", "1e13")),
    **dict.fromkeys(
        (
            *(
                "m",
                "n",
                "k",
                "batch_size",
                "isl",
                "kv_len",
                "seq_len",
                "num_heads",
                "num_kv_heads",
                "head_dim",
            ),
            *(
                "new_tokens",
                "hidden_size",
                "inter_size",
                "intermediate_size",
                "topk",
                "num_experts",
                "moe_tp",
            ),
            *("moe_ep", "ep", "num_slots", "num_local_experts", "local_experts", "num_tokens_global"),
            *("num_tokens_on_this_rank", "num_tokens", "n_embd", "n_expanded_embd", "n_ffn", "n_head"),
            *("n_kv_head", "tokens", "activated_experts", "tp"),
        ),
        NO_SIZES,
    ),
    **dict.fromkeys(("prefill_chunk", "kv_prefill", "n_decode", "kv_decode"), ("-3", "2.5", "", "1e13")),
}

#: Column → another whose value it must divide, or be divided by, or not exceed: a value that does not fit.
UNFIT = {
    ("attn_prefill", "num_kv_heads"): "7",
    ("attn_decode", "num_kv_heads"): "5",
    ("infersim_h800_gqa_decode", "num_kv_heads"): "3",
    ("frontier_h800_attention_chunked", "num_kv_heads"): "3",
    ("moe_kernels", "moe_ep"): "3",
    ("moe_kernels", "moe_tp"): "11",
    ("moe_kernels", "topk"): "4096",
    ("wideep_moe_sglang", "ep"): "3",
    ("wideep_moe_sglang", "topk"): "257",
    ("wideep_moe_skew_trtllm_h100", "ep"): "7",
    ("wideep_moe_skew_trtllm_h100", "num_slots"): "128",
    ("wideep_moe_skew_trtllm_h100", "tokens_arriving_at_hot_rank"): "99999999",
    ("infersim_h800_grouped_gemm", "ep"): "3",
    ("infersim_h800_grouped_gemm", "num_local_experts"): "5",
    ("frontier_a800_moe", "moe_tp"): "5",
    ("frontier_a800_moe", "topk"): "129",
    ("frontier_a800_moe", "local_experts"): "64",
    ("vidur_elementwise_ops", "tp"): "3",
    ("vidur_elementwise_ops", "n_kv_head"): "3",
    ("frontier_h800_ops_405b", "n_head"): "7",
    ("rtxpro6000_vllm_kernels", "tp"): "3",
    ("rtxpro6000_vllm_kernels:fused_moe_forced_routing", "activated_experts"): "129",
    ("rtxpro6000_vllm_kernels:attention_mixed_batch", "tp"): "3",
}

#: Columns that no price depends on.
NO_MATTER = {
    *("kernel_source", "framework", "tokens_per_rank", "tokens_per_dp_rank", "tokens_per_gpu", "backend"),
    *("context", "routed_token_slots", "load_cv_over_local_experts", "gemm_type"),
}

#: Columns that a form does not read although others do.
UNREAD = {
    "moe_kernels": {"model"},
    "frontier_a800_moe": {"model"},
    "vidur_elementwise_ops": {"model"},
    "frontier_h800_ops_405b": {"model"},
    "infersim_h800_grouped_gemm": {"kernel"},
    "frontier_h800_attention_chunked": {"kernel", "tp"},
    "rtxpro6000_vllm_kernels": {
        *("activated_experts", "prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    },
    "rtxpro6000_vllm_kernels:fused_moe_forced_routing": {
        *("layer", "prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    },
    "rtxpro6000_vllm_kernels:attention_mixed_batch": {"layer", "tokens", "activated_experts"},
}
FORMS = (*READERS, *(form for form in UNREAD if ":" in form))


def some_rows(form: str, count: int = 4) -> Columns:
    """Column → texts of some rows of a measured table, of one kind if it is named behind a colon."""
    name, _, kind = form.partition(":")
    table = measured(name)
    there = np.arange(len(table["source"]))
    if "kind" in table:
        there = np.flatnonzero(table["kind"] == (kind or "dense"))
    rows = there[np.unique(np.linspace(0, len(there) - 1, count).astype(int))]
    return {
        column: ["" if value != value else str(value) for value in values[rows].tolist()]
        for column, values in table.items()
        if column not in TOLD or column in ("gpu", "framework", "kernel_source")
    }


def written(folder: Path, columns: Columns) -> Path:
    path = folder / "rows.csv"
    lines = [columns.keys(), *zip(*columns.values(), strict=True)]
    path.write_text("".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines))
    return path


def spoilt(columns: Columns, name: str, text: str) -> Columns:
    """The rows with another text in the second of them, line 3 of the file."""
    return {**columns, name: [columns[name][0], text, *columns[name][2:]]}


def pairs() -> Iterator[tuple[str, str]]:
    for form in FORMS:
        for name in some_rows(form):
            if name not in NO_MATTER | UNREAD.get(form, set()):
                yield form, name


@pytest.mark.parametrize(("form", "name"), [*pairs()])
def test_a_wrong_value_in_any_column_is_told_with_its_line_and_what_it_says(
    form: str, name: str, tmp_path: Path
) -> None:
    good = some_rows(form)
    for bad in SPOILT[name]:
        with pytest.raises(ClustersimError, match=rf"rows.csv: line 3: {name} = "):
            price_file(written(tmp_path, spoilt(good, name, bad)))


@pytest.mark.parametrize(("form", "name"), UNFIT)
def test_a_value_that_does_not_fit_the_others_is_told_with_its_line(
    form: str, name: str, tmp_path: Path
) -> None:
    columns = spoilt(some_rows(form), name, UNFIT[form, name])
    with pytest.raises(ClustersimError, match=rf"line 3: .*{UNFIT[form, name]}"):
        price_file(written(tmp_path, columns))


@pytest.mark.parametrize("form", FORMS)
def test_a_column_without_which_nothing_can_be_priced_is_missed_by_name(form: str, tmp_path: Path) -> None:
    good = some_rows(form)
    may_lack = {
        *("kv_cache_dtype", "kv_dtype", "mla_dtype", "quant", "phase", "scope", "distribution", "num_slots"),
        *("tokens_arriving_at_hot_rank", "tokens_per_expert", "num_local_experts", "local_experts"),
        *("num_experts", "ep", "moe_ep", "num_tokens_global", "gpu"),
    }
    needed = {name for here, name in pairs() if here == form} - may_lack
    for name in needed:
        bare = {other: texts for other, texts in good.items() if other != name}
        with pytest.raises(ClustersimError, match=rf'line 1: column .*"{name}".* is missing'):
            price_file(written(tmp_path, {**bare, "x": good[name]}))


@pytest.mark.parametrize("form", FORMS)
def test_columns_that_no_price_depends_on_may_be_missing_or_say_anything(form: str, tmp_path: Path) -> None:
    good = some_rows(form)
    idle = (NO_MATTER | UNREAD.get(form, set())) & set(good) - {"framework", "kernel_source", "gemm_type"}
    idle -= {"context"}
    whole = price_file(written(tmp_path, good)).seconds.tolist()
    bare = {name: texts for name, texts in good.items() if name not in idle - {"tokens_per_gpu"}}
    assert price_file(written(tmp_path, bare)).seconds.tolist() == whole
    silly = {
        name: ["so, so"] * len(texts) if name in idle - {"tokens_per_gpu"} else texts
        for name, texts in good.items()
    }
    assert price_file(written(tmp_path, silly)).seconds.tolist() == whole


@pytest.mark.parametrize("form", FORMS)
def test_names_may_have_blanks_around_them_and_letters_of_any_size(form: str, tmp_path: Path) -> None:
    good = some_rows(form)
    words = {"gpu", "dtype", "attn_dtype", "kv_cache_dtype", "phase", "op", "kind", "layer", "distribution"}
    shouted = {
        f" {name.upper()} ": [f" {text.upper()} " if name in words else text for text in texts]
        for name, texts in good.items()
    }
    assert (
        price_file(written(tmp_path, shouted)).seconds.tolist()
        == price_file(written(tmp_path, good)).seconds.tolist()
    )


def test_a_wrong_row_ends_the_command_with_status_2_one_line_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, spoilt(some_rows("frontier_a800_moe"), "local_experts", "1e13"))
    assert _status(["price", str(path), "--out", str(tmp_path / "out.csv")]) == 2
    streams = capsys.readouterr()
    assert streams.err.count("\n") == 1 and "Traceback" not in streams.err and not streams.out
    assert [one.name for one in tmp_path.iterdir()] == ["rows.csv"]


def test_two_columns_of_one_name_are_refused_however_they_are_written(tmp_path: Path) -> None:
    for other in ("M", " m"):
        columns = {"gpu": ["H100"], "dtype": ["fp8"], "m": ["1"], "n": ["1"], "k": ["1"], other: ["2"]}
        with pytest.raises(ClustersimError, match="which is meant"):
            price_file(written(tmp_path, columns))


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        *((name, "bf16") for name in ("BF16", "bfloat16", "float16", "fp16", "half")),
        *((name, "fp8") for name in ("FP8", "fp8_e4m3", "float8_e4m3fn", "e4m3")),
        *((name, "fp4") for name in ("nvfp4", "mxfp4", "FP4")),
        ("fp8_block", "fp8_block"),
        ("w4a16_mxfp4", "w4a16"),
    ],
)
def test_dtypes_are_known_by_all_their_names(said: str, ours: str, tmp_path: Path) -> None:
    columns = {"gpu": ["B200"] * 2, "dtype": [said, ours], "m": ["8"] * 2, "n": ["512"] * 2, "k": ["512"] * 2}
    one, other = price_file(written(tmp_path, columns)).seconds.tolist()
    assert one == other


def test_a_library_is_known_without_its_version_and_an_unknown_one_is_nobody(tmp_path: Path) -> None:
    said = [
        "vllm 0.24.0",
        "vLLM",
        "vllm==0.19",
        "vllm-v1",
        "TensorRT-LLM 1.0",
        "trtllm",
        "tensorrt_llm-1.2",
        "",
    ]
    names = libraries({"framework": np.array(said)}).tolist()
    assert names == ["vllm"] * 4 + ["trtllm"] * 3 + [""]
    good = some_rows("gemm_vllm_h100")
    bare = {name: texts for name, texts in good.items() if name != "framework"}
    strange = {**good, "framework": ["someone's own 3"] * 4}
    prices = [price_file(written(tmp_path, columns)).seconds.tolist() for columns in (bare, strange)]
    assert prices[0] == prices[1]


def test_a_model_of_a_profile_is_any_of_the_catalogue(tmp_path: Path) -> None:
    columns = some_rows("rtxpro6000_vllm_kernels:attention_mixed_batch")
    known = {**columns, "model": ["Llama-3.1-8B"] * 4, "tp": ["1"] * 4}
    same = {**known, "model": ["meta-llama/llama_3_1_8b"] * 4}
    larger = {**known, "model": ["Llama-3.1-405B"] * 4}
    one, other, more = (price_file(written(tmp_path, some)).seconds for some in (known, same, larger))
    assert one.tolist() == other.tolist() and more.sum() > 2 * one.sum()


def test_experts_lie_on_more_ranks_than_there_are_only_where_they_are_copied(tmp_path: Path) -> None:
    good = some_rows("wideep_moe_skew_trtllm_h100")
    wide = {**good, "num_experts": ["8"] * 4, "num_slots": ["32"] * 4, "ep": ["16"] * 4, "topk": ["2"] * 4}
    bare = {name: texts for name, texts in wide.items() if name != "tokens_arriving_at_hot_rank"}
    copied = {**bare, "distribution": ["power_law_1.2_eplb"] * 4}
    assert (price_file(written(tmp_path, copied)).seconds > 0).all()
    with pytest.raises(ClustersimError, match="line 3: ep = 16 does not divide num_experts = 8"):
        price_file(written(tmp_path, spoilt(copied, "distribution", "power_law_1.2")))


def test_chunks_that_say_decode_are_new_tokens_and_only_one_each(tmp_path: Path) -> None:
    good = some_rows("frontier_h800_attention_chunked")
    decode = {**good, "phase": ["decode"] * 4, "new_tokens": ["1"] * 4}
    assert price_file(written(tmp_path, decode)).calls == {"attention_decode": 4}
    with pytest.raises(ClustersimError, match="line 3: new_tokens = 5 is more than the 1 there are"):
        price_file(written(tmp_path, spoilt(decode, "new_tokens", "5")))


# ---- lists of kernels -----------------------------------------------------------------------------

MIXED = {
    "kernel": ["gemm", "attention-decode", "MLA_decode", "norm", "experts", "expert_up"],
    "gpu": ["H100", "b200", "h200", "mi300x", "A100", "H800"],
    "dtype": ["fp8", "", "", "", "", "fp8_block"],
    "m": ["16", *[""] * 5],
    "n": ["4096", *[""] * 5],
    "k": ["7168", *[""] * 5],
    "batch": ["", "64", "32", "", "", ""],
    "kv-len": ["", "4096", "1000", "", "", ""],
    "heads": ["", "32", "16", "", "", ""],
    "kv_heads": ["", "8", "", "", "", ""],
    "tokens": ["", "", "", "512", "64", ""],
    "width": ["", "", "", "8192", "", ""],
    "hidden": ["", "", "", "", "4096", "7168"],
    "inter": ["", "", "", "", "14336", "2048"],
    "top_k": ["", "", "", "", "2", "8"],
    "experts": ["", "", "", "", "8", ""],
    "counts": ["", "", "", "", "", "12;0;7"],
}


def test_each_row_of_a_list_costs_what_its_kernel_costs_by_flags(tmp_path: Path) -> None:
    found = price_file(written(tmp_path, MIXED))
    names = [*MIXED]
    for place, seconds in enumerate(found.seconds.tolist()):
        row = {name: MIXED[name][place] for name in names if MIXED[name][place]}
        kernel, gpu = row.pop("kernel").lower(), row.pop("gpu")
        flags = [f"--{name.replace('_', '-')}={text.replace(';', ',')}" for name, text in row.items()]
        one = price_flags(kernel, gpu, flags)["prices"][0]
        assert (seconds, ORIGINS[found.origin[place]]) == (one["seconds"], one["origin"])
    assert found.parts == {} and sum(found.calls.values()) == 6


@pytest.mark.parametrize(
    ("name", "texts", "said"),
    [
        ("kernel", ["gem"] * 6, 'line 2: kernel = gem is no kernel .did you mean "gemm"'),
        ("kernel", ["gemm", "", *["norm"] * 4], "line 3: kernel = nothing is no kernel"),
        ("m", ["", *[""] * 5], "line 2: m is missing; gemm wants it"),
        ("m", ["-5", *[""] * 5], "line 2: m = -5 is not a whole number from 1"),
        ("m", ["1e13", *[""] * 5], "line 2: m = 10000000000000 is not a whole number from 1"),
        ("dtype", ["fp9", *[""] * 5], "line 2: dtype = fp9 is no known dtype"),
        ("dtype", ["fp8", "", "", "", "fp8", "fp8"], 'line 6: a100_sxm does not compute in "fp8"'),
        ("kv_heads", ["", "5", *[""] * 4], "line 3: 5 KV heads do not divide 32 heads"),
        ("top_k", [*[""] * 4, "9", "8"], "line 6: --top-k = 9 is more than the 8 there are"),
        ("counts", [*[""] * 5, "1;x"], "line 7: counts = 1;x is no list of tokens"),
        ("gpu", ["H100", "b2", *["H100"] * 4], "line 3: gpu = b2 is no GPU"),
    ],
)
def test_a_wrong_cell_of_a_list_is_told_with_its_line(
    name: str, texts: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ClustersimError, match=said):
        price_file(written(tmp_path, {**MIXED, name: texts}))


def test_a_list_that_lacks_the_column_of_a_size_says_which(tmp_path: Path) -> None:
    bare = {("kk" if name == "k" else name): texts for name, texts in MIXED.items()}
    with pytest.raises(ClustersimError, match=r'line 1: column "k" is missing \(did you mean "kk"\?\)'):
        price_file(written(tmp_path, bare))


# ---- prices on GPUs that nobody timed -------------------------------------------------------------

#: A price is not more than so many times the roofline and a few launches: what makes the worst of these is in
#: the measurements (products that quantise their input, attention that walks long KV on one SM).
FAR = 60.0


@pytest.mark.parametrize(
    "gpu", [one for one in read_catalogue("gpus").values() if isinstance(one, Gpu)], ids=lambda g: g.name
)
def test_measured_calls_have_a_sensible_price_on_every_gpu_of_the_catalogue(gpu: Gpu) -> None:
    for rows in measured_rows():
        few = taken(rows, np.arange(0, len(rows), max(len(rows) // 60, 1)))
        kernel = KERNELS[few.kernel]
        for form in sorted(set(few.format.tolist()) & set(gpu.flop_rate) | {"bf16"}):
            if rate_key(form) not in gpu.flop_rate:
                continue
            priced = price_calls(kernel, gpu, form, few.columns)
            least = kernel.least(gpu, form, few.columns)
            moved = few.columns["bytes"] / gpu.memory_bandwidth if "bytes" in few.columns else 0.0
            assert np.isfinite(priced.seconds).all() and (priced.seconds >= least).all()
            assert (priced.seconds <= FAR * (np.maximum(least, moved) + 20e-6)).all(), (few.file, few.kernel)


def test_a_gpu_is_priced_by_one_that_is_alike_where_neither_it_nor_its_relative_was_timed() -> None:
    assert "a800_sxm" in siblings("a100_sxm") and "h100_sxm" not in siblings("b200_sxm")
    basis = basis_of(KERNELS["experts"], gpu_named("a100_sxm"), "bf16", "vllm")
    assert basis is not None and basis.gpu == "a800_sxm"
    rows = next(rows for rows in measured_rows() if rows.file == "frontier_a800_moe")
    priced = price_calls(KERNELS["experts"], gpu_named("a100_sxm"), "bf16", rows.columns)
    assert {ORIGINS[place] for place in priced.origin.tolist()} == {"extrapolated"}


def test_the_library_asked_for_is_taken_from_a_like_gpu_before_another_library_of_the_same() -> None:
    basis = basis_of(KERNELS["mla_decode"], gpu_named("h20"), "bf16", "flashinfer")
    assert basis is not None and (basis.gpu, basis.library) == ("h800_sxm", "flashinfer")


def test_latent_attention_that_nobody_timed_costs_more_than_its_roofline() -> None:
    gpu = gpu_named("b200_sxm")
    modules = [rows for rows in measured_rows() if rows.kernel.endswith("_module")]
    assert {basis_of(KERNELS[rows.kernel], gpu, "bf16") for rows in modules} == {None}
    for rows in modules:
        kernel = KERNELS[rows.kernel]
        priced = price_calls(kernel, gpu, "bf16", rows.columns)
        least = kernel.least(gpu, "bf16", rows.columns)
        assert np.median(priced.seconds / (least + gpu.launch_latency)) > 1.3
