"""Dense products in the measured tables: their sizes, and rows that the fit must not see."""

import collections

import numpy as np
import pytest

from clustersim.errors import ClustersimError
from clustersim.spec.formats import flop_rate_of
from clustersim.spec.gpus import gpu_named
from clustersim.study.gemm_rows import READERS
from clustersim.study.measured import measured
from clustersim.study.pack import read_csv


def products(name):
    (rows,) = READERS[name](measured(name), name)
    return rows


@pytest.mark.parametrize("name", READERS)
def test_no_fitted_product_beats_the_peak_rate_or_reads_weights_faster_than_hbm(name):
    # A wrong width would show here: most rows are near one of the two limits.
    if name == "vidur_elementwise_ops":
        assert READERS[name](measured(name), name) == []
        return
    rows = products(name)
    seen = rows.left_out == ""
    m, n, k = (rows.columns[of][seen] for of in ("m", "n", "k"))
    measured_time = rows.measured[seen]
    rate = np.array(
        [flop_rate_of(gpu_named(g), f) for g, f in zip(rows.gpu[seen], rows.format[seen], strict=True)]
    )
    bandwidth = np.array([gpu_named(g).memory_bandwidth for g in rows.gpu[seen].tolist()])
    number = np.where(rows.format[seen] == "bf16", 2.0, 1.0)
    assert (2 * m * n * k / rate <= measured_time).all()
    assert (number * n * k / bandwidth <= measured_time).all()
    # And somewhere half of a limit is reached, as it would not be with widths too small.
    assert ((2 * m * n * k / rate) / measured_time).max() > 0.5
    assert ((number * n * k / bandwidth) / measured_time).max() > 0.5


def test_products_of_a_layer_have_the_widths_of_the_model():
    rows = products("frontier_h800_ops_405b")
    # Llama-3.1-405B, hidden 16384, inner 53248, 128 heads and 8 KV heads of 128; TP8.
    shapes = set(zip(rows.columns["n"].tolist(), rows.columns["k"].tolist(), strict=True))
    tp8 = {((128 + 2 * 8) * 128 / 8, 16384.0), (16384.0, 2048.0), (2 * 53248 / 8, 16384.0), (16384.0, 6656.0)}
    assert tp8 <= shapes
    assert len(shapes) == 16
    assert set(rows.format.tolist()) == {"fp8"}


def test_weights_that_came_from_l2_are_left_out_where_reading_them_rules():
    rows = products("rtxpro6000_vllm_kernels")
    marked = np.char.find(rows.left_out.astype(str), "L2") >= 0
    # Two products of Qwen3-30B-A3B, of 21 and 17 MB; the L2 holds 128 MB.
    shapes = set(zip(rows.columns["n"][marked].tolist(), rows.columns["k"][marked].tolist(), strict=True))
    assert shapes == {(5120.0, 2048.0), (2048.0, 4096.0)}
    assert rows.columns["m"][marked].max() == 256


def test_a_product_slower_per_token_than_one_of_more_tokens_was_throttled_by_what_ran_before():
    rows = products("frontier_h800_ops_405b")
    marked = np.char.find(rows.left_out.astype(str), "throttled") >= 0
    # TP4's up product took 19.6 ms for 16384 tokens and 24.7 ms for twice as many.
    at = (rows.columns["m"] == 16384) & (rows.columns["n"] == 26624)
    assert marked[at].tolist() == [True]
    assert marked.sum() == 10
    # Slow, but so is all that is longer: that is the product's own doing.
    alone = (rows.columns["m"] == 16384) & (rows.columns["n"] == 106496)
    assert marked[alone].tolist() == [False]


def test_deepgemms_fp8_is_scaled_by_blocks():
    rows = products("infersim_h800_gemm")
    assert set(rows.format.tolist()) == {"fp8_block"}
    assert set(rows.library.tolist()) == {"deepgemm"}


def test_libraries_and_formats_are_those_of_the_files():
    rows = products("gemm_trtllm")
    counted = collections.Counter(zip(rows.gpu.tolist(), rows.format.tolist(), strict=True))
    assert counted[("h100_sxm", "fp8_block")] == 2208
    assert set(rows.library.tolist()) == {"trtllm"}
    assert set(products("gemm_vllm_h100").library.tolist()) == {"vllm"}


def test_rows_of_a_user_need_no_library_and_no_times(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("gpu,dtype,m,n,k\nH100,fp8,1,2,3\nB200,nvfp4,4,5,6\n", encoding="utf-8")
    (rows,) = READERS["gemm_trtllm"](read_csv(path), "mine.csv")
    assert rows.file == "mine.csv"
    assert rows.format.tolist() == ["fp8", "fp4"]
    assert rows.library.tolist() == ["", ""]
    assert np.isnan(rows.measured).all()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("H100,bfloat16,-4,5,6", "line 3: m = -4"),
        ("H100,bfloat16,4,0,6", "line 3: n = 0"),
        ("H100,bfloat16,4,5,6.5", "line 3: k = 6.5"),
        ("Z100,bfloat16,4,5,6", "line 3: gpu = Z100"),
        ("H100,bf17,4,5,6", "line 3: dtype = bf17"),
    ],
)
def test_a_wrong_row_is_told_with_its_line(tmp_path, row, problem):
    path = tmp_path / "mine.csv"
    path.write_text(f"gpu,dtype,m,n,k\nH100,bfloat16,1,2,3\n{row}\n", encoding="utf-8")
    with pytest.raises(ClustersimError, match=f"^{problem} "):
        READERS["gemm_trtllm"](read_csv(path), "mine.csv")


def test_a_layer_nobody_knows_is_told_with_its_line():
    table = dict(measured("frontier_h800_ops_405b"))
    table["op"] = table["op"].astype(object)
    table["op"][2] = "mlp_up_prj"
    table["op"] = table["op"].astype(str)
    with pytest.raises(ClustersimError, match=r'^line 4: op = mlp_up_prj .*did you mean "mlp_up_proj"'):
        READERS["frontier_h800_ops_405b"](table, "mine.csv")
